"""Are there multi-modal neurons in a language model that never saw a picture? docs/measurements/language-neurons.md."""
