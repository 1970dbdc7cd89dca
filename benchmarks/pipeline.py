"""From photographs to Action Units: photos a second, end to end, and where the time goes.

    python benchmarks/pipeline.py [--photos 32] [--task detection] [--detector auto] [--device cuda]

Photographs are rendered faces pasted into larger grey pictures (or those of `--folder`). First each stage is timed by
itself, one after the other; then the pipeline runs as users run it, with and without finding faces ahead of the model.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from decoding import faces
from PIL import Image
from transformers import pipeline

from au_llava import default_checkpoint
from au_llava.face_alignment import find_faces, open_image


def photographs(folder: Path, count: int) -> list[Path]:
    """JPEG files of 1280 x 960 pixels with one face each."""
    paths = []
    for number, face in enumerate(faces(count)):
        picture = Image.new("RGB", (1280, 960), (110, 120, 130))
        picture.paste(face.convert("RGB").resize((448, 448)), (416, 256))
        paths.append(folder / f"{number:04}.jpg")
        picture.save(paths[-1], quality=92)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=default_checkpoint())
    parser.add_argument("--folder", help="photographs of your own")
    parser.add_argument("--photos", type=int, default=32)
    parser.add_argument("--task", default="detection")
    parser.add_argument("--detector", default="auto")
    parser.add_argument("--readout", default="exact")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    pipe = pipeline(
        "facial-action-units", model=args.model, trust_remote_code=True, device=args.device,
        dtype=getattr(torch, args.dtype), batch_size=args.batch_size,
    )  # fmt: skip
    model, processor = pipe.model, pipe.processor

    with tempfile.TemporaryDirectory() as made:
        if args.folder:
            paths = sorted(path for path in Path(args.folder).iterdir() if path.is_file())[: args.photos]
        else:
            paths = photographs(Path(made), args.photos)
        stages: dict[str, float] = {}

        def timed(stage: str, run: Callable):
            start = time.perf_counter()
            result = run()
            if args.device != "cpu":
                torch.cuda.synchronize()
            stages[stage] = time.perf_counter() - start
            return result

        find_faces(open_image(paths[0]), detector=args.detector)  # loads the detector
        pictures = timed("open", lambda: [open_image(path) for path in paths])
        found = timed("find and align", lambda: [find_faces(p, detector=args.detector) for p in pictures])
        crops = [face.crop for some in found for face in some]
        batches = [crops[start : start + args.batch_size] for start in range(0, len(crops), args.batch_size)]
        grammar = timed("grammar", lambda: processor.grammar(args.task))
        model.recognize(**processor(images=crops[:1], task=args.task), grammar=grammar)  # fills the memory of texts
        inputs = timed("tensors", lambda: [processor(images=batch, task=args.task) for batch in batches])
        pixels = [batch["pixel_values"] for batch in inputs]
        timed("encoder (part of the next)", lambda: [model.encode(part, processor.mirror) for part in pixels])
        how = {"grammar": grammar, "readout": args.readout, "mirror": processor.mirror}
        answers = timed("recognize", lambda: [model.recognize(**batch, **how) for batch in inputs])
        timed("name", lambda: [processor.read(answer, args.task) for answer in answers])

        settings = {"task": args.task, "detector": args.detector, "readout": args.readout}
        names = [str(path) for path in paths]
        whole: dict[str, float] = {}
        for workers in (0, 1, 2):
            timed("whole", lambda workers=workers: pipe(names, num_workers=workers, **settings))
            whole[f"{workers} threads ahead"] = len(paths) / stages.pop("whole")

    print(f"{len(paths)} photographs, {len(crops)} faces, {args.task}, detector {args.detector}, {args.readout}")
    print(f"{'stage':30}{'ms a photo':>12}")
    for stage, seconds in stages.items():
        print(f"{stage:30}{1000 * seconds / len(paths):>12.2f}")
    for name, rate in whole.items():
        print(f"pipeline, {name:20}{rate:>12.2f} photos a second")
    if args.json:
        print(json.dumps({"photos": len(paths), "faces": len(crops), "seconds": stages, "photos_per_second": whole}))


if __name__ == "__main__":
    main()
