"""``run_serve``: recommendations and live sessions over HTTP."""

import argparse
import math
import os
import sys
from pathlib import Path

from recbole_ssm.cli import run

DESCRIPTION = """\
Serve a checkpoint over HTTP: recommendations for histories, live sessions, and a page to try them at /. Loopback alone
unless --host says otherwise."""

EXAMPLES = """\
examples:
  run_serve --checkpoint saved/STARRec-Nov-21-2026_10-00-00.pth
  run_serve --checkpoint model.pth --items films.item --title film_title
  run_serve --checkpoint model.pth --redis redis://localhost:6379/0 --workers 4 --token_file token
  RECBOLE_SSM_TOKEN=... run_serve --checkpoint model.pth --host 0.0.0.0

Secrets are read from files or from the environment: RECBOLE_SSM_TOKEN holds the token, and RECBOLE_SSM_REDIS the
address of Redis where that has a password."""

TOKEN, REDIS = "RECBOLE_SSM_TOKEN", "RECBOLE_SSM_REDIS"


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="run_serve",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", metavar="FILE", required=True, help="the model")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0: a free one (default: 8000)")
    parser.add_argument("--workers", type=int, default=1, help="processes; several need --redis (default: 1)")
    parser.add_argument("--token_file", metavar="FILE", help="holds the token that requests are to bear")
    parser.add_argument("--items", metavar="FILE", help="RecBole's .item file, with titles (default: the dataset's)")
    parser.add_argument("--title", metavar="COLUMN", help="its column of titles (default: the first named so)")
    sessions = parser.add_argument_group("sessions")
    sessions.add_argument(
        "--rule", default="window", choices=("window", "endless"),
        help="past MAX_ITEM_LIST_LENGTH events: read the latest (default), or let the state go on",
    )  # fmt: skip
    sessions.add_argument("--redis", metavar="URL", help="keep them there, such as redis://localhost:6379/0")
    sessions.add_argument("--session_days", type=float, help="in Redis, after the last event (default: 30)")
    sessions.add_argument("--max_sessions", type=int, help="in memory (default: 100000)")
    sessions.add_argument("--max_session_mb", type=int, help="in memory, of their states (default: 1024)")
    limits = parser.add_argument_group("limits of requests")
    limits.add_argument("--max_body_kb", type=int, default=1024, help="(default: 1024)")
    limits.add_argument("--timeout", type=float, default=30, metavar="SECONDS", help="(default: 30)")
    limits.add_argument("--max_batch", type=int, default=256, help="requests scored together (default: 256)")
    limits.add_argument(
        "--max_waiting", type=int, default=10_000, help="requests of a kind that may wait (default: 10000)"
    )
    return parser


def main() -> int:
    """Run the command on ``sys.argv``; returns its exit status."""
    args = build_parser().parse_args()
    return run("run_serve", lambda: _serve(args))


def _serve(args: argparse.Namespace) -> None:
    from recbole_ssm.errors import UserError

    for option in (
        "session_days",
        "max_sessions",
        "max_session_mb",
        "max_body_kb",
        "timeout",
        "max_batch",
        "max_waiting",
    ):
        if (value := getattr(args, option)) is not None and not 0 < value < math.inf:
            raise UserError(f"--{option} is {value}: choose a number above 0.")
    if args.redis and "@" in args.redis:
        raise UserError(f"a password in --redis can be read by everybody on this machine: set {REDIS} instead.")
    redis = args.redis or os.environ.get(REDIS)
    here, there = ("Redis", "memory") if redis else ("memory", "Redis")
    for option in ("max_sessions", "max_session_mb") if redis else ("session_days",):
        if getattr(args, option) is not None:
            raise UserError(f"--{option} is of sessions in {there}, and these are kept in {here}: leave it out.")
    if args.title and not args.items:
        raise UserError("--title is a column of --items: name that file, too.")
    token = _token(args.token_file)
    if args.host not in ("127.0.0.1", "::1", "localhost") and token is None:
        print(f"run_serve: {args.host} can be reached by others, and there is no token: see --help.", file=sys.stderr)
    try:
        from recbole_ssm.serving.http.gate import Limits
        from recbole_ssm.serving.http.served import Served, serve
    except ModuleNotFoundError as error:
        raise UserError(f"run_serve needs {error.name}: pip install 'recbole-ssm[serve]'.") from error
    sessions = {
        "session_seconds": args.session_days and (int(args.session_days * 24 * 3600) or 1),
        "most_sessions": args.max_sessions,
        "most_session_bytes": args.max_session_mb and args.max_session_mb << 20,
    }
    served = Served(
        args.checkpoint,
        args.device,
        args.rule,
        redis,
        items=args.items,
        title=args.title,
        token=token,
        limits=Limits(args.max_body_kb << 10, args.timeout, args.max_batch, args.max_waiting),
        **{name: value for name, value in sessions.items() if value is not None},
    )
    serve(served, args.host, args.port, args.workers)


def _token(file: str | None) -> str | None:
    """The token of a file, else of the environment, else none."""
    from recbole_ssm.errors import UserError

    try:
        token = os.environ.get(TOKEN) if file is None else Path(file).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--token_file {file} cannot be read ({error}): write the token there.") from error
    if token is not None and (len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token):
        raise UserError("the token is to have 16 or more letters, digits and signs, and no spaces: make a longer one.")
    return token


if __name__ == "__main__":
    sys.exit(main())
