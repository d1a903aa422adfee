"""A vision-language model as it is: loading, structure, recording."""
