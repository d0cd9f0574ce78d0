"""An export step for a build pipeline: exports, verifies, and fails the build when quality is lost.

python examples/export_in_ci.py CHECKPOINT BUNDLE [SAMPLES.jsonl]

Needs the extra [reference]. The report is written beside the bundle.
"""

import sys
from pathlib import Path

import mobilevlm
from mobilevlm.export.report import write_report
from mobilevlm.export.verify import verify


def main() -> int:
    """0 if the bundle is within the recipe's limits, 1 if not, 2 if the input is wrong."""
    checkpoint, bundle, *samples = sys.argv[1:]
    try:
        manifest = mobilevlm.export(checkpoint, bundle, recipe="int4")
        found = verify(bundle, checkpoint, data=samples[0] if samples else "scenes", layers=True)
        write_report(found, Path(f"{bundle}-quality.html"))
        if found.error is not None:
            raise found.error
    except mobilevlm.QualityError as error:
        print(error, file=sys.stderr)
        return 1
    except mobilevlm.MobileVLMError as error:
        print(error, file=sys.stderr)
        return 2
    megabytes = sum(entry.size for entry in manifest.files.values()) / 1e6
    print(f"{bundle}: {megabytes:.1f} MB, {found.num_samples} samples within all limits")
    return 0


if __name__ == "__main__":
    sys.exit(main())
