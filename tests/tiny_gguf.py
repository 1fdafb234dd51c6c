"""A tiny llama model with random weights, written as a GGUF v3 file with the standard library alone.

The same arguments give the same file. Its vocabulary (SPM) has all bytes, ASCII and prefixes of some
words, so any text can be encoded. Dimension 0 of the residual stream is constant, so that
``output.weight[:, 0]`` is a bias per token: even random weights say printable words, and never end
by themselves unless ``eos_bias`` is 6 or more.
"""

from __future__ import annotations

import array
import random
import struct
from pathlib import Path
from typing import Any

WORDS = (
    """the of and to in is you that it he was for on are as with his they be at one have this from or had by hot word
but what some we can out other were all there when up use your how said an each she which do their time if will way about
many then them write would like so these her long make thing see him two has look more day could go come did number sound
system user assistant hello prompt cache server router request token prefix model"""
).split()

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPACE = "\u2581"
BIAS = 4.0
UNKNOWN, CONTROL, NORMAL, BYTE = 2, 3, 1, 6
END_OF_TURN = "<|im_end|>"
ALIGNMENT = 32


def vocabulary() -> tuple[list[str], list[int]]:
    """Tokens and their types."""
    tokens, types = ["<unk>", "<s>", "</s>"], [UNKNOWN, CONTROL, CONTROL]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    types += [BYTE] * 256
    tokens += ["<|im_start|>", END_OF_TURN]
    types += [CONTROL] * 2
    prefixes = [SPACE + word[:end] for word in WORDS for end in range(1, len(word) + 1)]
    pieces = list(dict.fromkeys([SPACE, *map(chr, range(0x21, 0x7F)), *prefixes]))
    return tokens + pieces, types + [NORMAL] * len(pieces)


def weights(tokens: list[str], types: list[int], layers: int, dim: int, ffn: int, eos_bias: float) -> list[Any]:
    """(name, shape, values) of each tensor."""
    rng = random.Random(1)
    heads, kv = dim, dim // 2
    words = {SPACE + word for word in WORDS}

    def matrix(rows: int, columns: int, scale: float) -> array.array[float]:
        return array.array("f", (rng.gauss(0, scale) for _ in range(rows * columns)))

    def silent_row(values: array.array[float], columns: int) -> array.array[float]:
        values[:columns] = array.array("f", bytes(4 * columns))
        return values

    embedding, output = matrix(len(tokens), dim, 1.0), matrix(len(tokens), dim, 4 / dim**0.5)
    for at, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        embedding[at * dim] = BIAS
        bias = eos_bias if token == END_OF_TURN else 2.0 if token in words else -4.0 if kind == NORMAL else -30.0
        output[at * dim] = bias / BIAS
    ones = array.array("f", [1.0]) * dim
    scale = dim**-0.5
    found: list[Any] = [("token_embd.weight", (dim, len(tokens)), embedding)]
    for layer in range(layers):
        block = f"blk.{layer}."
        found += [
            (block + "attn_norm.weight", (dim,), ones),
            (block + "attn_q.weight", (dim, heads), matrix(heads, dim, 2 * scale)),
            (block + "attn_k.weight", (dim, kv), matrix(kv, dim, 2 * scale)),
            (block + "attn_v.weight", (dim, kv), matrix(kv, dim, scale)),
            (block + "attn_output.weight", (heads, dim), silent_row(matrix(dim, heads, scale), heads)),
            (block + "ffn_norm.weight", (dim,), ones),
            (block + "ffn_gate.weight", (dim, ffn), matrix(ffn, dim, scale)),
            (block + "ffn_up.weight", (dim, ffn), matrix(ffn, dim, scale)),
            (block + "ffn_down.weight", (ffn, dim), silent_row(matrix(dim, ffn, ffn**-0.5), ffn)),
        ]
    return [*found, ("output_norm.weight", (dim,), ones), ("output.weight", (dim, len(tokens)), output)]


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _field(value: Any) -> bytes:
    """A metadata value with its GGUF type: 4 uint32, 6 float32, 7 bool, 8 string, 9 array."""
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    kind, items = value
    packed = b"".join(map(_string, items)) if kind == 8 else struct.pack(f"<{len(items)}{'f' if kind == 6 else 'i'}", *items)
    return struct.pack("<IIQ", 9, kind, len(items)) + packed


def write(path: Path, layers: int = 2, dim: int = 64, ffn: int = 128, eos_bias: float = -30.0) -> None:
    """Write the model to ``path``, in about half a second."""
    tokens, types = vocabulary()
    scores = [0.0 if kind != NORMAL else float(-at) for at, kind in enumerate(types)]
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "general.name": "tiny-random-llama",
        "general.file_type": 0,
        "llama.context_length": 1 << 20,
        "llama.embedding_length": dim,
        "llama.block_count": layers,
        "llama.feed_forward_length": ffn,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": dim // 4,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": len(tokens),
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": (8, tokens),
        "tokenizer.ggml.scores": (6, scores),
        "tokenizer.ggml.token_type": (5, types),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": tokens.index(END_OF_TURN),
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    tensors = weights(tokens, types, layers, dim, ffn, eos_bias)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(_string(name) + _field(value) for name, value in metadata.items())
    offset = 0
    for name, shape, values in tensors:
        head += _string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        head += struct.pack("<IQ", 0, offset)
        offset += len(values) * 4 + -len(values) * 4 % ALIGNMENT
    with path.open("wb") as file:
        file.write(head + bytes(-len(head) % ALIGNMENT))
        for _, _, values in tensors:
            file.write(values.tobytes() + bytes(-len(values) * 4 % ALIGNMENT))
