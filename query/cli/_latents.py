"""How do the commands about latents read their common options?"""

import argparse


def add_latent_arguments(parser: argparse.ArgumentParser, *, where: str) -> None:
    """Add the options that say which latents count; `where` is the option's name of the SQL condition."""
    parser.add_argument(
        where, dest="where_latents", metavar="SQL", help="condition over the latents' statistics"
    )
    parser.add_argument("--min-density", type=float, help="least share of rows on which a latent fires")
    parser.add_argument("--max-density", type=float, help="largest share of rows on which a latent fires")
    parser.add_argument("--at", type=int, metavar="VERSION", help="ask an earlier version of the store")
    parser.add_argument(
        "--memory-mib", type=int, default=512, help="memory for buffers (default: %(default)s)"
    )


def add_mask_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that keep latents which are left out by default."""
    parser.add_argument("--keep-dead", action="store_true", help="do not leave out latents that never fire")
    parser.add_argument(
        "--keep-ultra-dense",
        action="store_true",
        help="do not leave out latents that fire on more than 10%% of the rows",
    )


def latent_options(args: argparse.Namespace) -> dict[str, object]:
    """Return the options of `add_latent_arguments` as keywords."""
    return {
        "where": args.where_latents,
        "density": (args.min_density, args.max_density),
        "memory_bytes": args.memory_mib << 20,
    }


def mask_options(args: argparse.Namespace) -> dict[str, object]:
    """Return the options of `add_mask_arguments` as keywords."""
    return {"mask_dead": not args.keep_dead, "mask_ultra_dense": not args.keep_ultra_dense}
