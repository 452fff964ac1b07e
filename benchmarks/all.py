"""Every benchmark of speed, memory and quality after the other, and one table of all figures.

    python -m benchmarks.all
    python -m benchmarks.all --run RUN --usual USUAL --quality RUN --report benchmarks.md
    python -m benchmarks.all --only roofline stage2 --report benchmarks.md

What needs no training runs by itself. `sample` needs a finished run with its `calotype distill` and a usual stage 2
(see there), `quality` a run to train again on; without them they are left out, and said so. Each is a process of its
own, whose last line holds its figures as JSON. --report writes them as a page of Markdown.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.figures import Figure, show

ALONE = ("roofline", "policy", "stage1", "stage2", "memory", "samplers", "data", "coldstart", "growth")
WORDS = {"stage1": ["--gan"]}


def main() -> int:
    """Run them; 1 if a figure misses its goal or a benchmark fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*ALONE, "sample", "quality"], help="default: all that can run")
    parser.add_argument("--run", type=Path, help="for sample: a finished run with distilled/")
    parser.add_argument("--usual", type=Path, help="for sample: a stage 2 trained with --objective epsilon")
    parser.add_argument("--quality", type=Path, help="for quality: a run whose latents and autoencoder are there")
    parser.add_argument("--quality-out", type=Path, help="its folder; one that is there is gone on with")
    parser.add_argument("--report", type=Path, help="a Markdown file of all tables")
    args = parser.parse_args()
    found = [run(name, words) for name, words in planned(args).items()]
    for result in found:
        show(f"{result['benchmark']} ({result['seconds']:.0f} s)", figures_of(result))
    if args.report:
        args.report.write_text(markdown(found))
    failed = [result["benchmark"] for result in found if result["failed"]]
    missed = [figure.name for result in found for figure in figures_of(result) if figure.met is False]
    Console().print(f"{len(found)} benchmarks; failed: {', '.join(failed) or 'none'}; missed: {len(missed)} figures.")
    print(json.dumps({"benchmark": "all", "results": found}))
    return int(bool(failed or missed))


def planned(args: argparse.Namespace) -> dict[str, list[str]]:
    """The words of each benchmark that can run; says which cannot."""
    words = {name: WORDS.get(name, []) for name in ALONE}
    if args.run and args.usual:
        words["sample"] = ["--run", str(args.run), "--usual", str(args.usual)]
    if args.quality:
        out = args.quality_out or Path(tempfile.mkdtemp(prefix="quality-"))
        words["quality"] = ["--run", str(args.quality), "--out", str(out)]
    wanted = args.only or [*ALONE, "sample", "quality"]
    for name in wanted:
        if name not in words:
            print(f"{name} is left out: give --run and --usual, or --quality.")
    return {name: words[name] for name in wanted if name in words}


def run(name: str, words: list[str]) -> dict[str, Any]:
    """The figures of one benchmark's last line; what it prints before that goes by on the screen."""
    print(f"\n$ python -m benchmarks.{name} {' '.join(words)}")
    began, last = time.monotonic(), ""
    command = [sys.executable, "-m", f"benchmarks.{name}", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(last, end="", flush=True)
            last = line
    try:
        found = json.loads(last)
    except ValueError:
        found = {}
    if not isinstance(found, dict) or "figures" not in found:
        print(last, end="")
        found = {"benchmark": name, "figures": []}
    found = {part: found[part] for part in ("benchmark", "machine", "settings", "figures") if part in found}
    found |= {"seconds": time.monotonic() - began, "failed": not found["figures"], "words": words}
    return found


def figures_of(result: dict[str, Any]) -> list[Figure]:
    """The figures of one result."""
    return [Figure(**{name: row[name] for name in Figure._fields}) for row in result["figures"]]


def markdown(found: list[dict[str, Any]]) -> str:
    """All tables as a page."""
    machine = next((result["machine"] for result in found if "machine" in result), {})
    lines = ["# Benchmarks", "", ", ".join(f"{name} {value}" for name, value in machine.items()), ""]
    for result in found:
        words = " ".join(result["words"])
        lines += [f"## {result['benchmark']}", "", f"`python -m benchmarks.{result['benchmark'].split()[0]} {words}`, "]
        lines[-1] += f"{result['seconds']:.0f} s{', failed' if result['failed'] else ''}"
        lines += ["", "| figure | found | 10-90 % | goal | | how |", "|---|---|---|---|---|---|"]
        lines += [_row(figure) for figure in figures_of(result)] + [""]
    return "\n".join(lines)


def _row(figure: Figure) -> str:
    spread = "" if figure.low is None else f"{figure.low:.3g}-{figure.high:.3g}"
    goal = "" if figure.goal is None else f"{'<=' if figure.at_most else '>='} {figure.goal:g}"
    verdict = {None: "", True: "met", False: "**missed**"}[figure.met]
    cells = [figure.name, f"{figure.value:.4g} {figure.unit}", spread, goal, verdict, figure.how]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


if __name__ == "__main__":
    sys.exit(main())
