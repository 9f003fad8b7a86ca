"""`actstore latents STORE RUN DICTIONARY`: latents with their statistics, searched by them or by their tokens."""

import argparse
import sys

from actstore.store import open_store

from ._latents import add_latent_arguments, latent_options
from ._print import print_result

HELP = "search a dictionary's latents by statistics and top tokens"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Columns for --where and --order-by: actstore sql STORE 'DESCRIBE latents'."
    parser.add_argument("store", metavar="STORE", help="folder or URL of the store")
    parser.add_argument("run_name", metavar="RUN", help="name of the run")
    parser.add_argument("dictionary", metavar="DICTIONARY", help="name of the dictionary")
    parser.add_argument("-k", type=int, default=20, help="latents (default: %(default)s)")
    parser.add_argument("--order-by", metavar="SQL", default="density DESC", help="default: %(default)s")
    parser.add_argument("--latent", type=int, action="append", help="only this latent; repeatable")
    parser.add_argument("--top-token", metavar="TEXT", help="only latents with this top token")
    parser.add_argument("--top-token-regex", metavar="REGEX", help="... with a top token that matches")
    parser.add_argument("--promotes", metavar="TEXT", help="only latents that promote this token")
    parser.add_argument("--promotes-regex", metavar="REGEX", help="... that promote a token that matches")
    parser.add_argument("--keep-dead", action="store_true", help="do not leave out latents that never fire")
    parser.add_argument(
        "--no-ultra-dense",
        action="store_true",
        help="leave out latents that fire on more than 10%% of the rows",
    )
    parser.add_argument("--plot", metavar="FILE", help="draw their histograms to FILE (.png, .svg, .pdf)")
    parser.add_argument("--html", metavar="FILE", help="write a page with their contexts to FILE")
    add_latent_arguments(parser, where="--where")


def run(args: argparse.Namespace) -> int:
    found = open_store(args.store, version=args.at).run(args.run_name)
    result = found.latents(
        args.dictionary,
        k=args.k,
        order_by=args.order_by,
        latents=args.latent,
        top_token=args.top_token,
        top_token_regex=args.top_token_regex,
        promotes=args.promotes,
        promotes_regex=args.promotes_regex,
        mask_dead=False if args.keep_dead else None,
        mask_ultra_dense=args.no_ultra_dense,
        **latent_options(args),
    )
    print_result(result, as_json=args.json)
    if not result.meta.n_returned and (args.plot or args.html):
        print("actstore: nothing was written: there is no latent to draw", file=sys.stderr)
    elif args.plot or args.html:
        from actstore.query import latent_page

        numbers = result.to_arrow()["latent"].to_pylist()
        if args.plot:
            latent_page.save_latents_picture(args.plot, found, args.dictionary, numbers)
        if args.html:
            latent_page.save_latent_page(args.html, found, args.dictionary, numbers)
    return 0
