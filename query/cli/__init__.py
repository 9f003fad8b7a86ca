"""Commands of `actstore` that ask: each module has `add_arguments(parser)` and `run(args) -> int`."""
