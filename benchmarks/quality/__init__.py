"""How good it is: edits, hallucination, readings and inspections of the pocket model, judged."""
