"""A vision-language model as it is: how it is loaded, what it is made of, and how it is run and recorded."""
