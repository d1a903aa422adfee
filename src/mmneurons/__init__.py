"""Find, inspect and edit the multi-modal neurons of vision-language models."""
