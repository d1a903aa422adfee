"""Figures of captions and maps: CHAIR, POPE, similarity of texts, regions."""
