"""Commands of `actstore` that write: each module has `add_arguments(parser)` and `run(args) -> int`."""
