"""Export step of a build pipeline: export, verify, and fail the build when quality is lost.

python examples/export_in_ci.py CHECKPOINT BUNDLE [SAMPLES.jsonl]

Needs the extra [reference]. The report is written beside the bundle.
"""

import argparse
import sys
from pathlib import Path

import mobilevlm
from mobilevlm.export.verification.report import write_report
from mobilevlm.export.verification.verify import verify


def main() -> int:
    """Return 0 if the bundle is within the recipe's limits, 1 if not, 2 if the input is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("bundle")
    parser.add_argument("samples", nargs="?", default="scenes")
    given = parser.parse_args()
    try:
        manifest = mobilevlm.export(given.checkpoint, given.bundle, recipe="int4")
        found = verify(given.bundle, given.checkpoint, data=given.samples, layers=True)
        write_report(found, Path(f"{given.bundle}-quality.html"))
        if found.error is not None:
            raise found.error
    except mobilevlm.QualityError as error:
        print(error, file=sys.stderr)
        return 1
    except mobilevlm.MobileVLMError as error:
        print(error, file=sys.stderr)
        return 2
    megabytes = sum(entry.size for entry in manifest.files.values()) / 1e6
    print(f"{given.bundle}: {megabytes:.1f} MB, {found.num_samples} samples within all limits")
    return 0


if __name__ == "__main__":
    sys.exit(main())
