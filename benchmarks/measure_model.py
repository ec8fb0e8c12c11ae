# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Speed and memory of a whole Aurea, to compare two states of the code or two releases of transformers.

    PYTHONPATH=src python benchmarks/measure_model.py --output after.json
    PYTHONPATH=/other/checkout/src python benchmarks/measure_model.py --output before.json
    python benchmarks/measure_model.py --compare before.json after.json

    python benchmarks/measure_model.py --config '{"connector_type": "prefix"}' --output prefix.json
    python benchmarks/measure_model.py --table prefix.json sva.json

The weights are random but the same in each run, by their names; so are the inputs. Beside each time stands what was
computed: `--compare` gives ratios of times and memory, and whether logits and tokens are the same. `--config` changes
the model, and `--table` lays what such models cost side by side.
"""

import argparse
import hashlib
import json
import statistics
import time
from pathlib import Path

import torch


TINY = {
    "text_config": {
        "model_type": "phi3",
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    },
    "spatial_vision_config": {
        "model_type": "dinov2_with_registers",
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 14,
    },
    "image_token_id": 98,
}


@torch.no_grad()
def make_model(settings: dict, device: str, dtype: torch.dtype):
    from transformers_aurea import AureaConfig, AureaForConditionalGeneration

    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = AureaForConditionalGeneration(AureaConfig(**settings)).eval()
    torch.set_default_dtype(torch.float32)
    for name, parameter in model.named_parameters():
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
        generator = torch.Generator(device).manual_seed(seed)
        parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.02, generator=generator)
    model.generation_config.eos_token_id = None
    return model


def make_inputs(model, rows: int, length: int, device: str, dtype: torch.dtype) -> dict:
    """`length` words a row and, at the second place, one picture."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, min(config.text_config.vocab_size, 50_000) - 5, (rows, length), generator=generator)
    num_placeholders = getattr(config, "placeholders_per_image", 1)  # version 0.1 has no choice
    placeholders = torch.full((rows, num_placeholders), config.image_token_id)
    input_ids = torch.cat([words[:, :1], placeholders, words[:, 2:]], dim=1)
    height, width = (max(sides) for sides in zip(*config.view_sizes))
    pixels = torch.randn(rows, len(config.view_sizes), 3, height, width, generator=generator)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": pixels.to(dtype)}
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def timed(function, device: str, repeats: int) -> tuple[float, float, object]:
    """Median seconds, peak MiB on a GPU, and the last result, after one run that is not counted."""
    result, times = function(), []
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else 0.0
    return statistics.median(times), peak, result


def measure(args) -> dict:
    import transformers

    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    start = time.perf_counter()
    model = make_model((TINY if args.tiny else {}) | args.config, args.device, dtype)
    inputs = make_inputs(model, args.rows, args.length, args.device, dtype)
    text = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}
    results = {"build": {"seconds": time.perf_counter() - start}}

    def record(name: str, function, computed):
        seconds, peak, result = timed(function, args.device, args.repeats)
        results[name] = {"seconds": seconds, "peak_mib": peak, "computed": computed(result)}

    def numbers(logits: torch.Tensor) -> list[float]:
        return logits[:, -1, :256].float().flatten().tolist()

    settings = {"do_sample": False, "max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens}
    settings |= {"pad_token_id": 0, "suppress_tokens": [model.config.image_token_id]}
    with torch.no_grad():
        features = lambda: model.get_image_features(inputs["pixel_values"]).pooler_output  # noqa: E731
        record("image features", features, lambda it: it[:, -1, :256].float().flatten().tolist())
        record("forward, pictures", lambda: model(**inputs, logits_to_keep=1).logits, numbers)
        record("forward, text", lambda: model(**text, logits_to_keep=1).logits, numbers)
        record("generate, pictures", lambda: model.generate(**inputs, **settings), lambda it: it.tolist())
        record("generate, text", lambda: model.generate(**text, **settings), lambda it: it.tolist())

    frozen = ("vision_model", "language_model")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("cross_attention_block" in name or not any(part in name for part in frozen))

    def step() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        return loss.detach()

    record("training step", step, lambda loss: [loss.item()])
    device_name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    settings = {"rows": args.rows, "length": args.length, "new_tokens": args.new_tokens, "dtype": str(dtype)}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    settings |= {
        "config": args.config,
        "placeholders": int((inputs["input_ids"] == model.config.image_token_id)[0].sum()),
    }
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    sizes = {"parameters": model.num_parameters(), "trained": trained}
    return {"device": device_name, **versions, **settings, **sizes, "results": results}


def compare(before: Path, after: Path):
    one, other = (json.loads(path.read_text()) for path in (before, after))
    print(f"{one['device']}; transformers {one['transformers']} → {other['transformers']}, torch {other['torch']}")
    for name, result in one["results"].items():
        new = other["results"][name]
        line = f"{name:28} {result['seconds'] * 1e3:9.1f} → {new['seconds'] * 1e3:9.1f} ms"
        line += f"  ×{new['seconds'] / result['seconds']:.3f}"
        if result.get("peak_mib"):
            line += f"   memory ×{new['peak_mib'] / result['peak_mib']:.4f}"
        if "computed" in result:
            a, b = torch.tensor(result["computed"]).double(), torch.tensor(new["computed"]).double()
            line += f"   largest difference {(a - b).abs().max():.3g} of {a.abs().max():.3g}"
        print(line)


def table(paths: list[Path]):
    columns = ["", "trained", "placeholders", "picture, ms", "prefill, ms", "token, ms", "training step, ms", "GiB"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for path in paths:
        run = json.loads(path.read_text())
        times = {name: result["seconds"] * 1e3 for name, result in run["results"].items()}
        token = (times["generate, pictures"] - times["forward, pictures"]) / (run["new_tokens"] - 1)
        picture = times["image features"] / run["rows"]
        cells = [path.stem, f"{run['trained'] / 1e6:.0f} M", str(run["placeholders"]), f"{picture:.1f}"]
        cells += [f"{times['forward, pictures']:.0f}", f"{token:.1f}", f"{times['training step']:.0f}"]
        cells.append(f"{run['results']['training step']['peak_mib'] / 1024:.1f}")
        print("| " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"))
    parser.add_argument("--table", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--config", type=json.loads, default={}, help="settings of the model's configuration, as JSON")
    parser.add_argument(
        "--tiny", action="store_true", help="a model of a few thousand weights, not the published size"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.compare:
        return compare(*args.compare)
    if args.table:
        return table(args.table)
    measured = json.dumps(measure(args))
    args.output.write_text(measured) if args.output else print(measured)


if __name__ == "__main__":
    main()
