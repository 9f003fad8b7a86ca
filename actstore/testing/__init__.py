"""What do tests of a store need that is worth shipping? Small real objects that stand in for unreliable ones."""
