"""The command `au-llava`: Action Units of photographs and videos, for people who do not write Python."""

import os
import socket
import sys
from argparse import ArgumentParser, BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from importlib.util import find_spec
from pathlib import Path

from . import __version__
from .action_units import PRESETS, TASKS, describe
from .inputs import is_camera


EXIT_CODES = (
    "exit codes: 0 all well, 1 some inputs failed or could not be drawn, 2 wrong usage or set-up, 130 interrupted"
)


def parser() -> ArgumentParser:
    """What the command takes."""
    top = ArgumentParser("au-llava", description="Recognise facial Action Units (AUs).", epilog=EXIT_CODES)
    top.add_argument("--version", action="version", version=f"au-llava {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run, text: str, epilog: str = EXIT_CODES) -> ArgumentParser:
        made = commands.add_parser(
            name, help=text, description=text, epilog=epilog, formatter_class=RawDescriptionHelpFormatter
        )
        made.set_defaults(run=run)
        return made

    def units(made: ArgumentParser) -> None:
        made.add_argument("--action-units", metavar="AUS", help=f"{', '.join(PRESETS)}, or codes such as AU1,AU12")

    def setup(made: ArgumentParser) -> None:
        made.add_argument(
            "--model", metavar="DIR_OR_ID", help="model folder or Hub id (default: the one that comes along)"
        )
        detectors = "auto, scrfd, cascade, none (pictures are face crops), or an SCRFD .onnx file (default: auto)"
        made.add_argument("--detector", default="auto", metavar="NAME", help=detectors)
        made.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: an accelerator if there is one)")

    made = command("recognize", _recognize, "Recognise Action Units in photographs and videos.", _EXAMPLES)
    inputs = "pictures, videos, folders, patterns, addresses, a camera's number, or - for a list on standard input"
    made.add_argument("input", nargs="+", metavar="INPUT", help=inputs)
    task = "what to ask: 0 or 1, a level from 0 to 5, a decimal from 0 to 1, or all three (default: detection; with "
    task += "--openface also intensity_level)"
    made.add_argument("--task", choices=[*TASKS, "all"], help=task)
    units(made)
    output = "a .csv, .jsonl or .parquet file, or - for JSON Lines (default: tables to read)"
    made.add_argument("--output", metavar="FILE", help=output)
    overlay = "also draw boxes and bars, a picture or film for each input; for a single input also a file's name"
    made.add_argument("--overlay", type=Path, metavar="DIR_OR_FILE", help=overlay)
    evidence = "draw on photographs' overlays where the model looked: attention (fast) or occlusion (more faithful)"
    made.add_argument("--evidence", choices=["attention", "occlusion"], help=evidence)
    made.add_argument(
        "--fps", type=_rate, metavar="N", help="look at N frames of each second of a video (default: all)"
    )
    smooth = "smooth the answers of a video by their median over N seconds (default: not at all)"
    made.add_argument("--smooth", type=_rate, metavar="N", help=smooth)
    made.add_argument("--openface", action="store_true", help="name the columns as OpenFace 2 does: AU12_c, AU12_r")
    made.add_argument("--max-faces", type=_positive, metavar="N", help="at most N faces a picture, the largest")
    made.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="faces at a time (default: 8)")
    readout = "exact, or parallel: one pass, for a model trained for it, as the default one is (default: exact)"
    made.add_argument("--readout", choices=["exact", "parallel"], default="exact", help=readout)
    mirror = "also ask about each face's mirror image: twice the work, fewer errors (default: as the model says)"
    made.add_argument("--mirror", action=BooleanOptionalAction, help=mirror)
    setup(made)

    made = command("demo", _demo, "Recognise Action Units in the example pictures and write a report.")
    made.add_argument("--output", type=Path, default=Path("demo"), metavar="DIR", help="where to (default: demo)")
    setup(made)

    made = command("app", _app, "Open a web page for photographs, videos and a webcam.")
    made.add_argument("--port", type=_port, metavar="N", help="port to serve at (default: the first free from 7860)")
    setup(made)

    made = command("describe", _describe, "Print the text description T that the model is asked with.", _LISTS)
    made.add_argument("--task", choices=list(TASKS), default="detection", help="(default: detection)")
    units(made)

    made = command("doctor", _doctor, "Tell what is installed and what is missing, and try it out.")
    setup(made)
    return top


_EXAMPLES = f"""\
examples:
  au-llava recognize portrait.jpg --task all
  au-llava recognize photos/ --task intensity_level --action-units AU6,AU12 --output smiles.csv --overlay drawn/
  find . -name '*.png' | au-llava recognize - --output all.parquet
  au-llava recognize talk.mp4 --fps 5 --output talk.csv --overlay drawn/
  au-llava recognize 0 --fps 2 --output session.csv     (camera 0, until Ctrl-C)

{EXIT_CODES}"""


_LISTS = f"""\
A model that was trained on whole lists of Action Units, as the default one, is asked about the list with those given.

{EXIT_CODES}"""


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError
    return int(text)


def _port(text: str) -> int:
    if not 1 <= int(text) <= 65535:
        raise ValueError
    return int(text)


def _rate(text: str) -> float:
    if not 0 < float(text) < 1000:
        raise ValueError
    return float(text)


# argparse shows these names: "invalid whole number above 0 value: '0'"
_positive.__name__, _rate.__name__ = "whole number above 0", "number above 0 and below 1000"
_port.__name__ = "port from 1 to 65535"


# torch takes seconds to import; help and describe do without.
def _recognize(arguments: Namespace) -> int:
    if is_camera(arguments.input[0]):
        from .camera import run
    else:
        from .recognize import run

    return run(arguments)


def _demo(arguments: Namespace) -> int:
    from .demo import run

    return run(arguments)


def _app(arguments: Namespace) -> int:
    if not find_spec("gradio"):
        raise ImportError("The web page needs Gradio; install it with `pip install au-llava[app]`.")
    from .app import launch
    from .photos import check_detector, load_pipeline

    if arguments.port:
        _check_free(arguments.port)
    detector = check_detector(arguments.detector)
    launch(load_pipeline(arguments.model, arguments.device), detector, server_port=arguments.port)
    return 0


def _check_free(port: int) -> None:
    """See that a port can be had, before the model is loaded."""
    with socket.socket() as place:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            place.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(f"Port {port} is taken, or not yours to take ({error}); give another --port.") from error


def _doctor(arguments: Namespace) -> int:
    from .doctor import run

    return run(arguments)


def _describe(arguments: Namespace) -> int:
    print(describe(arguments.task, arguments.action_units))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit code."""
    chosen = parser().parse_args(arguments)
    try:
        code = chosen.run(chosen)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as `head`, has what it wanted; Python must not write there again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"au-llava: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
