"""`actstore neighbours STORE RUN LATENT`: the latents most like one."""

import argparse

from actstore.store import open_store

from ._latents import add_latent_arguments, add_mask_arguments, latent_options, mask_options
from ._print import print_result

HELP = "find the latents most like one, by decoder or by firing together"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="folder or URL of the store")
    parser.add_argument("run_name", metavar="RUN", help="name of the run")
    parser.add_argument("latent", metavar="LATENT", help="latent:DICTIONARY:INDEX")
    parser.add_argument("-k", type=int, default=20, help="latents (default: %(default)s)")
    parser.add_argument(
        "--by",
        choices=["decoder", "encoder", "coactivation"],
        default="decoder",
        help="what is compared (default: %(default)s)",
    )
    parser.add_argument(
        "--measure",
        choices=["cosine", "jaccard", "npmi", "phi", "lift", "p_other", "p_this"],
        help="default: cosine of weights, npmi of coactivation",
    )
    parser.add_argument(
        "--unit",
        choices=["token", "document"],
        default="token",
        help="what counts as firing together (default: %(default)s)",
    )
    parser.add_argument(
        "--min-both", type=int, default=5, help="least number of tokens or documents (default: %(default)s)"
    )
    add_latent_arguments(parser, where="--where")
    add_mask_arguments(parser)


def run(args: argparse.Namespace) -> int:
    found = open_store(args.store, version=args.at).run(args.run_name)
    result = found.neighbours(
        args.latent,
        args.k,
        by=args.by,
        measure=args.measure,
        unit=args.unit,
        min_both=args.min_both,
        **latent_options(args),
        **mask_options(args),
    )
    print_result(result, as_json=args.json)
    return 0
