"""How much memory a bundle takes, told from its manifest: the peak of a process that loads it and
answers one question about one image.

The parts, and what each follows from (docs/explanation/runtime.md tells more,
benchmarks/memory.py measures):

- libraries: Python, numpy, onnxruntime, tokenizers and their files; a tokenizer takes eight times
  its file.
- weights, as ONNX Runtime's kernels order them. A product of weights in blocks (MatMulNBits) keeps
  ``bits / 8`` bytes of each weight and 8 of each block (a float32 scale, and a float32 sum beside
  it), whatever the file has. 8-bit weights of ``int8`` and floats take what the file has; those of
  ``fp16`` are made float32, and kept twice. llama.cpp keeps a second copy of Q4_0 in another order.
- loading: pages of the file that are being packed, which go as the copies come
  (runtime/engines/onnx/mapped_weights.py).
- buffers of a run: attention and MLP of one layer at a time, which the formulas below add up; of
  the image encoder once for each tile that is encoded at the same time.
- the image: pixels of its tiles, its rows, and these once more in pieces or among the prompt's.
- keys and values of the positions that are filled.
- mapped: pages of files that the system can take back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mobilevlm.audio_encoder import SoundEncoder
from mobilevlm.bundle import TOKENIZER, Artifact, Manifest
from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.image_encoder import NativeEncoder, TransformerEncoder
from mobilevlm.input_spec import InputSpec, Mel, PixelImages, SquareImages
from mobilevlm.linear_groups import LinearGroup, decoder_groups, output_groups
from mobilevlm.plan import DRAWING, LLAMA_ENGINES, OPTIONAL, PREFILL_CHUNK, Plan, engine_stages
from mobilevlm.preparation import most_pieces, most_pixels, most_positions, most_runs
from mobilevlm.prompt import count_positions, count_rows
from mobilevlm.recipe import BLOCK_BITS, LinearFormat, Precision
from mobilevlm.state_buffers import fixed_shape, slot_buffers, window_rows

LIBRARIES = 32e6
"""Own memory of Python, numpy, onnxruntime, tokenizers and the rest before they hold a model."""
LIBRARY_FILES = 50e6
"""Their files' resident pages."""
LLAMA_FILES = 4e6
"""llama.cpp's besides."""
ONLY_LLAMA, ONLY_LLAMA_FILES = 30e6, 34e6
"""Both where all is llama.cpp's, and onnxruntime stays away."""
ROWS = 256
"""Different embedding rows that a text of any length is taken to have."""
REPACKED = ("q4_0", "q4_k_m")
"""Types that llama.cpp keeps once more in another order (x86 with AVX2)."""
TOKENIZER_FACTOR = 8
SESSION = 2.5e6
"""Bytes of ONNX Runtime for a graph with little in it."""
IN_PASSING = 80e6
"""Pages of a file that are resident at a time while its weights are packed, at most."""
ROW = 1 << 16
"""Resident pages around an embedding row that is read."""
TEXT_POSITIONS = 128
"""Default length of a question and its answer, without the image."""

_PLAIN: dict[Precision, float] = {"int8": 1.0, "q8": 1.0, "q4": 0.5, "q2": 0.25}
STORED = _PLAIN | {"fp32": 4.0, "fp16": 2.0, "qdq8": 1.0, "qdq16": 1.0}
"""Bytes of a weight in the file, scales aside."""
PACKED = _PLAIN | {"fp32": 4.0, "fp16": 8.0, "qdq8": 5.0, "qdq16": 5.0}
"""Bytes of a weight in memory, scales aside."""
_BLOCK_SUMS = 8
"""Bytes of a block in memory: scale and sum in float32."""
_SCALE = 2
"""Bytes of a block's scale in the file."""
_FLOAT, _HALF, _BYTE = 4, 2, 1
_SAMPLE_BYTES = 40
"""Bytes that a sample of a sound takes while its spectrum is made"""
_FIXED_POINT = ("qdq8", "qdq16")
"""Precisions of graphs that keep keys and values in bytes"""


@dataclass(frozen=True)
class Memory:
    """Bytes of a process at its peak."""

    libraries: float
    """Before there is a model, tokenizer included; without pages of files."""
    weights: float
    """Copies of them, in the kernels' order"""
    working: float
    """Buffers of runs"""
    states: float
    """Keys and values of the positions that are filled at the peak"""
    files: float
    """Resident pages of libraries' files"""
    mapped: float
    """Resident pages of the model's files, most of which are read once; as those of libraries, the
    system can take them back"""
    reserved: float
    """Address space beyond all this: keys and values that are not filled, files that are mapped"""

    @property
    def own(self) -> float:
        """Bytes that must be there: without pages that the system can take back."""
        return self.libraries + self.weights + self.working + self.states

    @property
    def peak(self) -> float:
        """Resident at the peak."""
        return self.own + self.files + self.mapped

    @property
    def steady(self) -> float:
        """Bytes in use all the time: without pages of the model's files."""
        return self.own + self.files


@dataclass(frozen=True)
class _Stage:
    """A stage in ONNX Runtime."""

    weights: float
    """Resident when it is loaded"""
    run: float
    """Buffers of a run"""
    kept: float
    """Part of these that stays until the next run"""
    mapped: float = 0.0
    """Pages of its file while it is open"""
    unpacked: float = 0.0
    """Pages of its file while it is being loaded"""


def estimate(manifest: Manifest, plan: Plan, positions: int | None = None) -> Memory:
    """The peak of a process that loads a bundle by a plan (its engine settled), and fills
    ``positions`` of the context: by default an image's, and :data:`TEXT_POSITIONS`. Of a bundle
    compiled for an NPU: on the device, where binaries are mapped once."""
    decoder, encoded = manifest.spec.decoder, manifest.spec.encoded
    image = () if encoded is None else most_pieces(encoded)
    image_rows = count_rows(image)
    if positions is None:
        positions = count_positions(image) + TEXT_POSITIONS
    positions = min(positions, decoder.context_length)
    artifacts = _artifacts(manifest, plan.engine)
    own, pages, mapped = LIBRARIES, LIBRARY_FILES, 0.0
    if all(part.format == "gguf" for part in artifacts.values()):
        own, pages = ONLY_LLAMA, ONLY_LLAMA_FILES
    elif plan.engine in LLAMA_ENGINES:
        pages += LLAMA_FILES
    stored = artifacts["decoder"]
    exact = stored.format == "gguf"
    # llama.cpp's keys and values are there for the whole context at once.
    held = decoder.context_length if plan.engine in LLAMA_ENGINES[:2] else positions
    most = window_rows(decoder) if stored.format == "onnx" else decoder.context_length
    value = _value_size(manifest, stored)
    states = _slots_size(decoder, exact, value, held, min(held, most))
    states += _fixed_size(decoder)
    libraries = own + TOKENIZER_FACTOR * _size(manifest, [TOKENIZER])
    if plan.engine == "npu" and manifest.compiled:
        names = [name for part in manifest.compiled for name in part.files]
        binaries = _size(manifest, names)
        return Memory(libraries, binaries, 0.0, states, pages, 0.0, 0.0)
    stages: list[_Stage] = []
    for name, artifact in artifacts.items():
        size = _size(manifest, artifact.files)
        if name == "embeddings":
            tables = 1 + (decoder.layer_input_size > 0)  # a row of each is read
            mapped += min(size, max(min(positions - image_rows, ROWS), 0) * tables * ROW)
        elif artifact.format == "gguf":
            read = size * _read_share(decoder) if name == "decoder" else size
            stages.append(_gguf_stage(manifest, name, artifact, read, plan, positions))
            mapped += read if name == "decoder" else 0.0
        elif name == "prefill" and (plan.prefill_weights != "packed" or plan.memory != "fast"):
            stages.append(_Stage(SESSION, 0.0, 0.0, size))
        elif (
            encoded is not None
            and name == manifest.spec.encoder_stage
            and artifact.precision == "int8"
            and plan.vision_weights == "mapped"
        ):
            run = _tile_buffers(encoded, plan)
            stages.append(_Stage(SESSION, run, run * (plan.memory == "fast"), size))
        else:
            stages.append(_onnx_stage(manifest, name, artifact, size, plan, positions))
    if manifest.system_prompt is not None and plan.engine == "onnx":
        mapped += _size(manifest, [manifest.system_prompt.path])
    if encoded is None:
        stages.insert(0, _Stage(0.0, 0.0, 0.0))  # nothing in the place of the vision stage
    weights, filled, working, read = _peak(stages, states, plan)
    working += 0.0 if encoded is None else image_bytes(encoded)
    files = sum(_size(manifest, part.files) for part in artifacts.values())
    reserved = files + _slots_size(decoder, exact, value, decoder.context_length, most) - filled
    return Memory(libraries, weights, working, filled, pages, mapped + read, reserved)


def drawing_bytes(manifest: Manifest, prompt: int = TEXT_POSITIONS, sequences: int = 2) -> float:
    """Bytes that the first image takes beside what answers do: weights of the stages that draw,
    keys and values of the prompts and of all joined, and the largest maps of the decoder of codes.
    ``prompt``: positions of the prompt; ``sequences``: 2 with guidance, else 1."""
    output, decoder = manifest.spec.drawing, manifest.spec.decoder
    layers = manifest.recipe.projector.without_data()
    groups = output_groups(output, decoder.hidden_size)
    weights = sum(group.size for group in groups) * _packed(layers)
    stored = [part for part in manifest.artifacts if part.stage == "image_decoder"]
    weights += sum(_size(manifest, part.files) for part in stored) * _IMAGE_DECODER_COPIES
    value = _BYTE if manifest.recipe.kv_cache == "int8" else _FLOAT
    slots = sequences * (2 * prompt + output.num_tokens)
    states = _slots_size(decoder, False, value, slots, slots)
    maps = _MAPS * _FLOAT * output.edge**2 * max(output.decoder.widths[-2:])
    return weights + len(DRAWING) * SESSION + states + maps


_IMAGE_DECODER_COPIES = 2.0
"""Its file in memory: float32 of float16, or float32 that is packed once more."""
_MAPS = 4
"""Largest maps of the decoder of codes at a time."""


def _size(manifest: Manifest, names: Iterable[str]) -> float:
    """Return the bytes of files together; a GGUF file made elsewhere has no tokenizer file."""
    return float(sum(manifest.files[name].size for name in names if name in manifest.files))


def _artifacts(manifest: Manifest, engine: str) -> dict[str, Artifact]:
    """Return the artifacts that an engine opens, by stage."""
    kinds = engine_stages(engine, manifest.spec)
    kinds |= {stage: (kind,) for stage, kind in OPTIONAL.get(engine, {}).items()}
    if manifest.spec.decoder.encoder_layers:
        kinds["encoder"] = ("onnx",)
    found: dict[str, Artifact] = {}
    for stage, formats in kinds.items():
        for kind in formats:
            for part in manifest.artifacts:
                if (part.stage, part.format) == (stage, kind):
                    found.setdefault(stage, part)
    return found


def _peak(stages: list[_Stage], states: float, plan: Plan) -> tuple[float, float, float, float]:
    """Weights, keys and values, and what is needed beside them when these are most, and the pages
    of files that make up the rest of the peak. The first stage is the vision stage, which runs
    before there are keys and values."""
    moments = []
    in_turn = plan.engine == "onnx" and plan.memory == "in turn"
    for turn in [stages[:1], stages[1:]] if in_turn else [stages]:
        weights, read = sum(part.weights for part in turn), sum(part.mapped for part in turn)
        # Of a second turn keys and values are there while it loads. Loading reads what it packs,
        # not what stays in the file.
        there = states * (turn[0] is not stages[0])
        unpacked = sum(part.unpacked for part in turn)
        moments.append((weights, there, 0.0, unpacked))
        for at, part in enumerate(turn):
            kept = sum(other.kept for other in turn[:at])
            filled = states * (part is not stages[0])
            moments.append((weights, filled, kept + part.run, read))
    most = max(moments, key=lambda moment: sum(moment[:3]))
    return (*most[:3], max(map(sum, moments)) - sum(most[:3]))


def _onnx_stage(
    manifest: Manifest, name: str, artifact: Artifact, size: float, plan: Plan, positions: int
) -> _Stage:
    spec = manifest.spec
    if name in ("vision", "audio") and spec.encoded is not None:
        growth, run = _growth(manifest.recipe.tower), _tile_buffers(spec.encoded, plan)
        weights = size * growth
    else:
        weights = _decoder_bytes(manifest, name)
        run = _decoder_buffers(spec.decoder, min(plan.chunk_length, positions), positions)
    kept = run if plan.memory == "fast" else 0.0
    return _Stage(weights + SESSION, run, kept, unpacked=min(size, IN_PASSING))


def _decoder_bytes(manifest: Manifest, stage: str) -> float:
    """Bytes of the weights of a stage of the decoder in the kernels' order."""
    recipe = manifest.recipe.for_prefill() if stage == "prefill" else manifest.recipe
    groups = decoder_weights(manifest.spec.decoder, stage)
    layers = [layer for group in groups for layer in group.layers]
    return sum(layer.size * _packed(recipe.format_of(layer.name)) for layer in layers)


def _gguf_stage(
    manifest: Manifest, name: str, artifact: Artifact, read: float, plan: Plan, positions: int
) -> _Stage:
    """llama.cpp reads the image encoder into memory of its own and maps the decoder, some types of
    which it packs anew. ``read``: bytes of the file that are used."""
    if name == "vision":
        image = manifest.spec.image
        return _Stage(read, _vision_buffers(image) / 2, 0.0)
    packed = read if artifact.precision in REPACKED and plan.engine != "ggml" else 0.0
    run = _decoder_buffers(manifest.spec.decoder, min(PREFILL_CHUNK, positions), positions)
    return _Stage(packed, run, run)


def _read_share(spec: DecoderSpec) -> float:
    """Return the share of a GGUF decoder that is read as a whole: all but embeddings that are not
    the head too."""
    embeddings = 0.0 if spec.tie_word_embeddings else float(spec.hidden_size * spec.vocab_size)
    others = sum(group.size for group in decoder_weights(spec, "decoder"))
    return others / (others + embeddings)


def _block(layers: LinearFormat) -> float:
    """Weights in a block; no end of them where a scale is not for blocks."""
    return layers.block_size if layers.precision in BLOCK_BITS else math.inf


def _packed(layers: LinearFormat) -> float:
    """Bytes of a weight in memory."""
    return PACKED[layers.precision] + _BLOCK_SUMS / _block(layers)


def _growth(layers: LinearFormat) -> float:
    """Bytes in memory for one in the file."""
    return _packed(layers) / (STORED[layers.precision] + _SCALE / _block(layers))


def decoder_weights(spec: DecoderSpec, stage: str) -> list[LinearGroup]:
    """Return the linear layers of a stage of the decoder: ``encoder``, or any other."""
    return [
        group
        for group in decoder_groups(spec)
        if group.name.startswith("decoder.encoder.") == (stage == "encoder")
    ]


def image_bytes(spec: InputSpec) -> float:
    """Return the bytes of the largest image, or a sound of a window, beside an encoder's buffers:
    its samples, spectrum and frames, or its pixels, those of tiles
    twice as Pillow has them (resized, and resized again or cut); the rows of all runs, and those
    of the image."""
    preparation, runs = spec.preparation, most_runs(spec)
    rows, pixels = count_rows(most_pieces(spec)), 0
    if isinstance(preparation, PixelImages):
        pixels = (8 if runs > 1 else 3) * runs * most_pixels(spec)
    if isinstance(preparation, Mel):
        from mobilevlm.audio import usual_samples

        pixels = _SAMPLE_BYTES * usual_samples(spec)
    squares = runs > 1 and isinstance(preparation, SquareImages)
    before = runs * spec.connector.num_tokens if squares else rows
    return float(pixels + _FLOAT * (before + rows) * spec.connector.out_size)


def _tile_buffers(spec: InputSpec, plan: Plan) -> float:
    """Return the size of the tiles that are encoded at the same time."""
    return min(plan.parallel_tiles, most_runs(spec)) * _vision_buffers(spec)


def _vision_buffers(image: InputSpec) -> float:
    """Return the bytes of one layer's buffers: the hidden states and attention's products of them,
    and the MLP's inner states, five times for 8-bit products (each operator's, before and after).
    Attention keeps no scores. For a convolutional encoder, the stage with the largest maps
    counts."""
    spec = image.encoder
    if isinstance(spec, NativeEncoder):
        wide = spec.intermediate_size * len(spec.mlp_linears[0])
        sizes = [(most_positions(image), spec.hidden_size, wide)]
    elif isinstance(spec, (TransformerEncoder, SoundEncoder)):
        sizes = [(most_positions(image), spec.hidden_size, spec.intermediate_size)]
    else:
        sizes = [
            (spec.stage_grid(stage) ** 2, width, spec.mlp_size(stage))
            for stage, width in enumerate(spec.widths)
        ]
    return _FLOAT * max(count * (4 * width + 5 * wide) for count, width, wide in sizes)


def _decoder_buffers(spec: DecoderSpec, chunk: int, total: int) -> float:
    """Return the bytes of one layer's buffers over a chunk, with the scores of its attention."""
    layers = [spec.at(index) for index in range(spec.num_hidden_layers)]
    products = (spec.num_attention_heads + 2 * spec.num_key_value_heads) * max(
        layer.head_dim for layer in layers
    )
    wide = max(layer.intermediate_size for layer in layers)
    states = chunk * (4 * spec.hidden_size + 2 * products + 4 * wide + 3 * spec.layer_input_width)
    return _FLOAT * (states + spec.num_attention_heads * chunk * total + 2 * spec.vocab_size)


def _value_size(manifest: Manifest, decoder: Artifact) -> int:
    """Bytes of a number in the keys and values of a decoder."""
    if decoder.format == "gguf":
        return _HALF
    is_integer = manifest.recipe.kv_cache == "int8" or decoder.precision in _FIXED_POINT
    return _BYTE if is_integer else _FLOAT


def _slots_size(spec: DecoderSpec, exact: bool, value: int, filled: int, near: int) -> float:
    """Bytes of the keys and values of so many positions; ``exact``: without padding of heads;
    ``near``: positions of sliding layers."""
    buffers = slot_buffers(spec, exact)
    counts = {"kv": filled, "sliding": near}
    return float(sum(math.prod(part.sized(counts[part.kind])) for part in buffers) * value)


def _fixed_size(spec: DecoderSpec) -> float:
    """Bytes of the state whose size does not depend on the context: of recurrent ones before and
    after a run, and at three ends of a prompt's pieces, which a cache keeps as well."""
    copies = 1 if spec.delta is None else 2 + 2 * 3
    return float(copies * _FLOAT * math.prod(fixed_shape(spec)))


PAGE_MB = 350.0
"""A browser's process with a page, onnxruntime-web and a model of next to no weights (Chromium)."""
RESIDENT_WEB = 1.8
"""Its memory as a multiple of the weight files: onnxruntime's copy, and what it packs anew."""
STATE_COPIES = 4
"""Keys and values before and after a step, in the page and in onnxruntime."""


def estimate_web_mb(manifest: Manifest) -> float:
    """Resident megabytes of a browser's process in which the page of examples/web runs a bundle and
    has answered with a full context. The embedding table is held as it is."""
    files = {artifact.stage: artifact.files for artifact in manifest.artifacts}
    weights = {stage: sum(manifest.files[name].size for name in files[stage]) for stage in files}
    decoder = manifest.spec.decoder
    filled, near = decoder.context_length, window_rows(decoder)
    slots = _slots_size(decoder, False, _FLOAT, filled, near)
    states = STATE_COPIES * slots
    model = RESIDENT_WEB * (weights["vision"] + weights["decoder"]) + weights["embeddings"]
    return PAGE_MB + (model + states) / 1e6
