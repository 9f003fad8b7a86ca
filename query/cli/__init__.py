"""Commands of the `actstore` program that ask questions: one file each."""
