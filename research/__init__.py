"""Open questions, each with the script that looks into it; docs/measurements has what came out."""
