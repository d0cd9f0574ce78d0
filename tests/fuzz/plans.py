"""Mutated ``plan.json`` files beside a bundle: each is used, or passed over with a warning."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from pathlib import Path

import mobilevlm
from fuzz.harness import Fuzzer
from fuzz.mutations import mutate_bytes, mutate_json
from mobilevlm.bundle import Bundle, open_bundle
from mobilevlm.errors import PlanWarning
from mobilevlm.plan import Plan
from mobilevlm.runtime.plan_file import Candidate, TunedPlan, settle_plans, write_plan


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
    if random.random() < 0.5:
        content = mutate_bytes(random, plan.read_bytes())
    else:
        content = json.dumps(mutate_json(random, json.loads(plan.read_text()))).encode()
    shutil.copyfile(base / "bundle" / "manifest.json", scratch / "manifest.json")
    (scratch / "plan.json").write_bytes(content)
    return Bundle(scratch, bundle.manifest, bundle.digest)


def attempt(bundle: Bundle) -> None:
    """Settle the plan as loading does; any warning must be ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", PlanWarning)
        for plan in settle_plans(bundle, "auto", None, "auto"):
            assert 0 < plan.threads_of("decoder") <= 1024


FUZZER = Fuzzer(prepare, mutate, attempt)
