"""What does actstore do? A tour that needs no network: text from Python itself, models trained on the spot."""
