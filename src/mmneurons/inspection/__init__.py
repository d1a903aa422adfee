"""The experiments ask whether neurons are sensitive, specific and causal, and whether their ranking is true."""
