"""An export step for a build pipeline: exports, and fails the build when quality is lost.

python examples/export_in_ci.py CHECKPOINT BUNDLE
"""

import sys

import mobilevlm


def main() -> int:
    """0 if the bundle is within the recipe's limits, 1 if not, 2 if the checkpoint is wrong."""
    checkpoint, bundle = sys.argv[1:]
    try:
        manifest = mobilevlm.export(checkpoint, bundle, recipe="int4")
    except mobilevlm.QualityError as error:
        print(error, file=sys.stderr)
        return 1
    except mobilevlm.MobileVLMError as error:
        print(error, file=sys.stderr)
        return 2
    megabytes = sum(entry.size for entry in manifest.files.values()) / 1e6
    print(f"{bundle}: {megabytes:.1f} MB, measured: {manifest.quality.measured}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
