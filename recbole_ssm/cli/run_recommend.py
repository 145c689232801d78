"""``run_recommend``: a model's recommendations for every user of a file."""

import argparse
import importlib.util
import logging
import sys
import time
from pathlib import Path

from recbole_ssm.cli import run

DESCRIPTION = """\
Write the items that are most likely to come next for each user of a file, by a trained model. The input may be larger
than memory, and its rows in any order. Given again, the same command goes on where it was killed."""

EXAMPLES = """\
examples:
  run_recommend --checkpoint saved/STARRec.pth --input dataset/ml-1m/ml-1m.inter --output recommendations.parquet -k 20
  run_recommend --checkpoint saved/STARRec.pth --input interactions/ --output recommendations/ --index=faiss

The input: RecBole's atomic file (.inter), a CSV file with a header (.csv), a Parquet file (.parquet) or a folder of
such. Its columns have the names that the model was trained with (user_id, item_id, timestamp). The output: Parquet,
with the columns user, item, score and rank."""


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="run_recommend",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", metavar="FILE", required=True, help="of the model, as run_recbole saves it")
    parser.add_argument("--input", metavar="PATH", required=True, help="interactions of all users")
    parser.add_argument(
        "--output", metavar="PATH", required=True, help="a file, or with / at its end a folder of files"
    )
    parser.add_argument("-k", "--k", type=int, default=10, help="most items a user (default: 10)")
    seen = parser.add_mutually_exclusive_group()
    seen.add_argument(
        "--exclude_seen", action="store_true", default=True, help="leave a user's own items out (default)"
    )
    seen.add_argument(
        "--include_seen",
        dest="exclude_seen",
        action="store_false",
        help="recommend them, too (not by a model with allow_repeats: False)",
    )
    parser.add_argument("--candidates", metavar="FILE", help="recommend these items alone, an item a line")
    parser.add_argument(
        "--at", type=float, metavar="TIME",
        help="the time at which recommendations are asked for, for a model with request_time: known",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    parser.add_argument("--batch_users", type=int, default=4096, help="most users answered at a time (default: 4096)")
    parser.add_argument("--threads", type=int, help="of the CPU (default: as many as it has cores)")
    parser.add_argument(
        "--index", choices=("exact", "faiss"), default="exact",
        help="faiss: an approximate index, whose recall is measured on a sample, for large catalogues",
    )  # fmt: skip
    parser.add_argument(
        "--lists", type=int, help="with --index=faiss: lists of the index searched a user (default: 64)"
    )
    return parser


def main() -> int:
    """Run the command on ``sys.argv``; returns its exit status."""
    args = build_parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run("run_recommend", lambda: _recommend(args), "interrupted; the same command goes on where it was.")


def _recommend(args: argparse.Namespace) -> None:
    from recbole_ssm.errors import BackendUnavailable, UserError
    from recbole_ssm.serving import Recommender

    if importlib.util.find_spec("pyarrow") is None:
        raise BackendUnavailable("files are read and written by PyArrow: pip install 'recbole-ssm[serve]'.")
    from recbole_ssm.serving.batch import recommend_all, set_threads

    if args.lists is not None and args.index != "faiss":
        raise UserError("--lists is of an index: add --index=faiss, or leave it out.")
    if args.threads is not None:
        set_threads(args.threads)
    candidates = None if args.candidates is None else _lines(args.candidates)
    begun = time.monotonic()
    done = recommend_all(
        Recommender.load(args.checkpoint, args.device),
        args.input,
        args.output,
        args.k,
        args.exclude_seen,
        candidates,
        args.index,
        batch_users=args.batch_users,
        show_progress=True,
        at=args.at,
        **({} if args.lists is None else {"lists_searched": args.lists}),
    )
    print(
        f"{done.rows} recommendations for {done.answered} of {done.users} users in {args.output} "
        f"({time.monotonic() - begun:.1f} s)"
    )
    if done.recall is not None:
        print(f"recall@{args.k} of the index against the exact answer, for {done.sampled} users: {done.recall:.4f}")


def _lines(file: str) -> list[str]:
    from recbole_ssm.errors import UserError

    try:
        # As in data: an id may hold what splitlines() cuts at, too.
        return [line for line in Path(file).read_text(encoding="utf-8-sig").split("\n") if line]
    except (OSError, UnicodeError) as error:
        raise UserError(f"{file} cannot be read ({error}): give a file of items, one a line.") from error


if __name__ == "__main__":
    sys.exit(main())
