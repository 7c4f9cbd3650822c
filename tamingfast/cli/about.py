"""`tamingfast inspect`, `convert`, `export`, `push`, `download`, `info`: files, and what this machine can run."""

from __future__ import annotations

import argparse

from tamingfast import __version__, tasks
from tamingfast.cli.arguments import output, output_directory, source
from tamingfast.cli.options import ALLOW, FIRST_STAGE, JSON, OR_DEMO, Commands, command
from tamingfast.cli.progress import bars_of, print_json, say_written


def add_to(commands: Commands) -> None:
    text = "describe a checkpoint or token file, or how a picture was made"
    added = command(commands, "inspect", inspect, text, (JSON,))
    added.add_argument(
        "file", type=source, help=f"run directory, checkpoint, token file, or PNG that tamingfast drew{OR_DEMO}"
    )
    added = command(
        commands,
        "convert",
        convert,
        "convert a checkpoint of any family to one file with its config, back to .ckpt, or for diffusers",
        (ALLOW,),
    )
    added.add_argument("checkpoint", type=source)
    added.add_argument(
        "out", type=output,
        help="file to write: .safetensors, or .ckpt, which the original loads, with its .yaml; or folder for --layout "
        "diffusers",
    )  # fmt: skip
    added.add_argument(
        "--layout", choices=["tamingfast", "diffusers"], default="tamingfast",
        help="what to write: one file, or the folder of a VQModel of diffusers (default: %(default)s)",
    )  # fmt: skip
    added.add_argument("--dtype", help="round the weights to this: float32, bfloat16 or float16; default: float32")
    added.add_argument("--config", type=source, help="YAML config of the checkpoint, if it is not beside it")
    text = "write the encoder, decoder and transformer as programs that run without tamingfast, and check them"
    added = command(commands, "export", export, text, (ALLOW,))
    added.add_argument("model", type=source, help=f"run directory or checkpoint{OR_DEMO}")
    added.add_argument("--out", type=output_directory, required=True, help="directory to write into")
    added.add_argument("--format", default="torch", help="torch (.pt2 of torch.export) or onnx (default: torch)")
    text = "upload a model to the Hugging Face Hub, with a model card; HF_TOKEN or `hf auth login` says as whom"
    added = command(commands, "push", push, text, (ALLOW, FIRST_STAGE))
    added.add_argument("model", type=source, help="run directory or checkpoint")
    added.add_argument("repository", help="owner/name, which is made if it is missing")
    added.add_argument(
        "--figures", type=source, metavar="JSON", help="what `tamingfast evaluate --out` wrote, for the model card"
    )
    added.add_argument("--private", action="store_true", help="only its owner sees a repository that is made")
    added = command(commands, "download", download, "fetch what is downloaded on first use otherwise")
    added.add_argument("what", choices=["lpips"], help="the weights of the perceptual distance (64 MB)")
    command(commands, "info", info, "what this machine can run, and what is missing for the rest", (JSON,))


def inspect(arguments: argparse.Namespace) -> None:
    print_json(tasks.inspect(arguments.file))  # with --json or without: programs read it


def convert(arguments: argparse.Namespace) -> None:
    from tamingfast import checkpoints

    written = checkpoints.convert(
        arguments.checkpoint, arguments.out, arguments.config, allow=arguments.allow, layout=arguments.layout,
        dtype=arguments.dtype,
    )  # fmt: skip
    say_written(written)


def export(arguments: argparse.Namespace) -> None:
    model = tasks.Unread(arguments.model, "cpu", arguments.allow)
    written = tasks.export(model, arguments.out, arguments.format, bars=bars_of(arguments))
    for name, network in written.items():
        share = "tokens that differ" if "encoder" in name else "largest difference"
        say_written(f"{arguments.out}/{network.file}", f"{share} from the model's: {network.difference:.2g}")


def push(arguments: argparse.Namespace) -> None:
    from tamingfast import figures
    from tamingfast.checkpoints import hub, pretrained

    hub.check_repository(arguments.repository)
    measured = None if arguments.figures is None else figures.read(arguments.figures)
    model = tasks.Unread(arguments.model, "cpu", arguments.allow, arguments.first_stage).model
    url = pretrained.push_to_hub(model, arguments.repository, figures=measured, private=arguments.private or None)
    print(f"pushed: {url}")


def download(arguments: argparse.Namespace) -> None:
    from tamingfast.models import lpips_weights

    say_written(lpips_weights.download())


def info(arguments: argparse.Namespace) -> None:
    from tamingfast.models import lpips_weights
    from tamingfast.ops import info

    if arguments.json:
        print_json({"version": __version__, **info.facts(), "lpips": lpips_weights.describe()})
    else:
        print(f"tamingfast {__version__}\n{info.describe()}\nlpips      {lpips_weights.describe()}")
