"""Mutated ``plan.json`` files beside a bundle: each is used, or passed over with a warning."""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from pathlib import Path

import mobilevlm
from fuzz.harness import Fuzzer
from fuzz.mutations import VALUES, mutate_bytes, mutate_json
from mobilevlm.bundle import Bundle, open_bundle
from mobilevlm.errors import PlanWarning
from mobilevlm.plan import Plan, available_processors
from mobilevlm.runtime.memory.fitting import fit_plan
from mobilevlm.runtime.memory.limits import memory_limits
from mobilevlm.runtime.tuning.plan_file import Candidate, TunedPlan, settle_plans, write_plan


def prepare(folder: Path) -> None:
    """Export a small bundle and write a plan for this processor."""
    mobilevlm.export("nano", folder / "bundle", recipe="int4", measure=False)
    bundle = open_bundle(folder / "bundle")
    plan = Plan("onnx", vision_threads=1, decoder_threads=2, draft_tokens=3)
    candidate = Candidate("onnx: decoder threads", "2", 0.5, 3, True)
    write_plan(bundle, TunedPlan(bundle.digest, (plan,), (candidate,), 60.0, 12.0, True))


def mutate(base: Path, random: random.Random, scratch: Path) -> Bundle:
    """Put the bundle's manifest and a wrong plan into the scratch folder."""
    bundle = open_bundle(base / "bundle")
    plan = base / "bundle" / "plan.json"
    shutil.copyfile(base / "bundle" / "manifest.json", scratch / "manifest.json")
    kind = random.random()
    if kind < 0.05:
        _put_something_else(random, scratch / "plan.json")
        return Bundle(scratch, bundle.manifest, bundle.digest)
    if kind < 0.4:
        content = mutate_bytes(random, plan.read_bytes())
    else:
        data = json.loads(plan.read_text())
        if kind < 0.7:
            data = mutate_json(random, data)
        else:
            [processor] = data["processors"].values()
            [settings] = processor["plans"]
            settings[random.choice(sorted(settings))] = random.choice(VALUES)
        content = json.dumps(data).encode()
    (scratch / "plan.json").write_bytes(content)
    return Bundle(scratch, bundle.manifest, bundle.digest)


def _put_something_else(random: random.Random, path: Path) -> None:
    """Put what is no regular file where the plan should be."""
    kind = random.randrange(4)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    else:
        targets = ("/dev/zero", "/dev/stdin", "/proc/self/mem", "plan.json", "nothing")
        path.symlink_to(random.choice(targets))


def attempt(bundle: Bundle) -> None:
    """Settle the plan as loading does; any warning must be ours, and what engines would be given
    has its types and ranges."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", PlanWarning)
        plans = settle_plans(bundle, "auto", None, "auto")
        fit_plan(bundle, plans[0], memory_limits(), plans[1:])
    most = 4 * available_processors()
    for plan in plans:
        for threads in (plan.threads_of("vision"), plan.threads_of("decoder")):
            assert type(threads) is int and 0 < threads <= most
        for count in (plan.prefill_chunk, plan.prefill_from):
            assert type(count) is int and 0 < count <= 1 << 20
        assert plan.draft_tokens is None or type(plan.draft_tokens) is int
        assert type(plan.spinning) is bool
        assert isinstance(plan.describe(), str)


FUZZER = Fuzzer(prepare, mutate, attempt)
