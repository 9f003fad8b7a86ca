"""Codes, postings and latent statistics: computed from stored rows or on the fly."""
