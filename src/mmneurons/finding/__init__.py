"""From an image to the neurons that wrote each noun of its caption."""
