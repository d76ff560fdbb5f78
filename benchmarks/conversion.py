"""Peak memory and time of converting the released checkpoint, and of loading the result.

    python benchmarks/conversion.py                # 7B, as released: needs 28 GB of disk
    python benchmarks/conversion.py --layers 2     # the same with a shorter language model

The checkpoint is synthetic: the released names and shapes in bfloat16, random values, `.bin` shards of `torch.save`.
It is in a temporary folder that is deleted at the end. Conversion and loading run in their own processes. Their memory
is read from /proc (Linux) a hundred times a second: all resident memory, which includes the pages of mapped files, and
the process's own part of it (anonymous memory).
"""

import argparse
import itertools
import json
import math
import mmap
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from tables import finish


MB, GB = 10**6, 10**9
HIDDEN, INTERMEDIATE, VOCABULARY, STAB, PATCH = 4096, 11008, 32000, 1024, 14
REDUCED = int(STAB / 1.5)
SHARD_BYTES = 9_980_000_000  # a shard of `save_pretrained` with its former default of 10 GB
BLOCK_BYTES = 2**26

IMPORTS = "import video_panda_hf.conversion"
CONVERT = "import sys; from video_panda_hf.conversion import main; main(sys.argv[1:])"
ANSWER = """
import sys, time
import numpy as np
import video_panda_hf
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, num_frames = sys.argv[1], int(sys.argv[2])
start = time.perf_counter()
processor = AutoProcessor.from_pretrained(folder)
model = AutoModelForImageTextToText.from_pretrained(folder, device_map="auto")
print(f"{time.perf_counter() - start:.1f}", flush=True)
video = np.random.default_rng(0).integers(0, 256, (num_frames, 252, 448, 3), dtype=np.uint8)
content = [{"type": "video", "video": video}, {"type": "text", "text": "What happens in the video?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    processor_kwargs={"num_frames": num_frames},
).to(model.device)
start = time.perf_counter()
output = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
prompt = inputs["input_ids"].shape[1]
print(f"{prompt} {output.shape[1] - prompt} {time.perf_counter() - start:.1f}")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32, help="of the language model (default: 32, as released)")
    parser.add_argument("--frames", type=int, default=4, help="of the video in the prompt (default: 4)")
    parser.add_argument("--folder", type=Path, help="where to make the temporary folder (default: the system's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE, for tables.py")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that SIGTERM also deletes the folder

    with tempfile.TemporaryDirectory(prefix="video-panda-7b-", dir=arguments.folder) as folder:
        source, target = Path(folder) / "reference", Path(folder) / "converted"
        shapes = reference_shapes(arguments.layers)
        files = write_checkpoint(source, shapes, arguments.layers)
        size = sum(file.stat().st_size for file in files)
        largest = 2 * max(map(math.prod, shapes.values()))
        print(f"{len(shapes)} tensors in {len(files)} .bin files, {size / GB:.2f} GB; largest {largest / MB:.0f} MB")

        bound = 2 * largest + 500 * MB
        imports = measure([sys.executable, "-c", IMPORTS])
        conversion = measure([sys.executable, "-c", CONVERT, str(source), str(target)])
        if conversion.resident > bound:
            raise SystemExit("The conversion needs more memory than 2 × the largest tensor + 500 MB.")

        answer = measure([sys.executable, "-c", ANSWER, str(target), str(arguments.frames)])
    load_seconds, prompt, tokens, answer_seconds = map(float, answer.output.split())
    result = {
        "rows": [
            row("`import video_panda_hf.conversion` alone", imports),
            row("conversion", conversion),
            row('loading the result with `device_map="auto"`, and an answer', answer),
        ],
        "gigabytes": size / GB,
        "files": len(files),
        "largest_megabytes": largest / MB,
        "load_seconds": load_seconds,
        "prompt_tokens": int(prompt),
        "answer_tokens": int(tokens),
        "answer_seconds": answer_seconds,
    }
    finish("conversion", result, arguments.json)


def row(name: str, process: "Measured") -> dict:
    megabytes = {"megabytes": process.resident / MB, "own_megabytes": process.own / MB}
    return {"name": name, "seconds": process.seconds, **megabytes}


# The checkpoint


def reference_shapes(num_layers: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of a released checkpoint by its key, in the order of the model's layers."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        shapes |= {f"{prefix}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    shapes["model.norm.weight"] = (HIDDEN,)
    for tower in ("video_tower", "vision_tower"):
        shapes |= {f"model.{tower}.{name}": shape for name, shape in stab_shapes().items()}
    for projector in ("video_projector", "mm_projector"):
        shapes |= linear(f"model.{projector}.0", STAB, HIDDEN) | linear(f"model.{projector}.2", HIDDEN, HIDDEN)
    return {**shapes, "lm_head.weight": (VOCABULARY, HIDDEN)}


def stab_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {"patch_embedding.weight": (STAB, 3, PATCH, PATCH)}
    for name in ("lmhra1.pos_embed", "lmhra2.pos_embed"):
        shapes |= {f"{name}.0.{part}": (STAB,) for part in ("weight", "bias", "running_mean", "running_var")}
        shapes[f"{name}.0.num_batches_tracked"] = ()
        shapes |= {f"{name}.1.weight": (REDUCED, STAB, 1, 1, 1), f"{name}.1.bias": (REDUCED,)}
        shapes |= {f"{name}.2.weight": (REDUCED, 1, 3, 1, 1), f"{name}.2.bias": (REDUCED,)}
        shapes |= {f"{name}.3.weight": (STAB, REDUCED, 1, 1, 1), f"{name}.3.bias": (STAB,)}
    shapes |= {"dpe.weight": (STAB, 1, 3, 3, 3), "dpe.bias": (STAB,), "temporal_cls_token": (1, 1, STAB)}
    shapes |= {"dec.attn.in_proj_weight": (3 * STAB, STAB), "dec.attn.in_proj_bias": (3 * STAB,)}
    shapes |= linear("dec.attn.out_proj", STAB, STAB)
    shapes |= linear("dec.mlp.c_fc", STAB, 4 * STAB) | linear("dec.mlp.c_proj", 4 * STAB, STAB)
    shapes |= norm("dec.ln_1") | norm("dec.ln_2") | norm("dec.ln_3")
    for name in ("local_attention", "global_attention"):
        shapes |= norm(f"{name}.q.0") | norm(f"{name}.kv.0") | linear(f"{name}.proj", STAB, STAB)
        shapes |= {f"{name}.q.1.weight": (STAB, STAB), f"{name}.kv.1.weight": (2 * STAB, STAB)}
    shapes |= norm("proj.0") | linear("proj.2", STAB, STAB)
    return shapes | dict.fromkeys(("class_embedding", "balance", "split_embedding"), (STAB,))


def linear(name: str, size_in: int, size_out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size_out, size_in), f"{name}.bias": (size_out,)}


def norm(name: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (STAB,), f"{name}.bias": (STAB,)}


def write_checkpoint(folder: Path, shapes: dict[str, tuple[int, ...]], num_layers: int) -> list[Path]:
    """Writes a folder like the reference release and returns its weights files. No shard is in memory as a whole."""
    folder.mkdir()
    config = {
        "model_type": "videopanda",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 32,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "mm_projector_type": "mlp2x_gelu",
        "video_hidden_size": STAB,
    }
    (folder / "config.json").write_text(json.dumps(config))
    llama_like_tokenizer().save_pretrained(folder)

    shards, room = [], 0
    for key, shape in shapes.items():
        if 2 * math.prod(shape) > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(key)
        room -= 2 * math.prod(shape)
    places, files = {}, []
    with tqdm(total=len(shapes), desc="making the checkpoint", unit="tensor", disable=None) as progress:
        for number, keys in enumerate(shards, 1):
            files.append(folder / f"pytorch_model-{number:05d}-of-{len(shards):05d}.bin")
            write_shard(files[-1], {key: shapes[key] for key in keys}, progress.update)
            places |= dict.fromkeys(keys, files[-1].name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return files


def write_shard(file: Path, shapes: dict[str, tuple[int, ...]], written) -> None:
    """Writes the file with holes for the tensors, then their values into the mapped file."""
    dtypes = {key: torch.int64 if key.endswith("num_batches_tracked") else torch.bfloat16 for key in shapes}
    with torch.serialization.skip_data():
        torch.save({key: torch.empty(shape, dtype=dtypes[key]) for key, shape in shapes.items()}, file)
    with open(file, "r+b") as opened, torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        random = torch.randn(BLOCK_BYTES // 2, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
        for key in shapes:
            values = torch.load(file, mmap=True, weights_only=True)[key].view(-1)  # map again to free the old pages
            if key.endswith("running_var"):
                values.fill_(1)
            elif values.is_floating_point():
                for start in range(0, len(values), len(random)):
                    values[start : start + len(random)] = random[: len(values) - start]
            written()
        os.fsync(opened.fileno())  # otherwise writing these pages later slows down the measurement


def llama_like_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of Llama's kind and size: 32,000 pieces of one to three letters, and bytes."""
    letters = [chr(code) for code in range(33, 127)]
    pairs = [(a, b) for a, b in itertools.product(letters, letters)]
    triples = [(a + b, c) for (a, b), c in itertools.product(pairs, letters)]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters]
    merges = (pairs + triples)[: VOCABULARY - len(pieces)]
    pieces += [first + second for first, second in merges]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


# The measurement


@dataclass(frozen=True)
class Measured:
    """A finished process: seconds, peak resident bytes, peak anonymous bytes, output."""

    seconds: float
    resident: int
    own: int
    output: str


def measure(command: list[str]) -> Measured:
    """Runs a command. Raises `subprocess.CalledProcessError` if it fails."""
    peaks = {"VmHWM": 0, "RssAnon": 0}
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            while process.poll() is None:
                # Not `ru_maxrss`: it starts at the memory of this process.
                for name, kilobytes in re.findall(
                    r"^(VmHWM|RssAnon):\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE
                ):
                    peaks[name] = max(peaks[name], 1024 * int(kilobytes))
                time.sleep(0.01)
        except BaseException:
            process.kill()
            raise
        seconds, output = time.perf_counter() - start, process.stdout.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command[:3])
    return Measured(seconds, peaks["VmHWM"], peaks["RssAnon"], output)


if __name__ == "__main__":
    main()
