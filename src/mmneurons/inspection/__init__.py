"""Is what was found true? So far: whether a finder's ranking agrees with what silence does."""
