"""Asks a bundle about a picture and streams the answer.

python examples/ask.py BUNDLE PICTURE "What is in the picture?"
"""

import sys

import mobilevlm


def main() -> None:
    """Streams the answer, then prints how long each stage took."""
    bundle, picture, question = sys.argv[1:]
    with mobilevlm.load(bundle) as vlm:
        stream = vlm.stream(question, images=[picture], max_new_tokens=128)
        for piece in stream:
            print(piece, end="", flush=True)
        times = stream.generation.timings
    print(f"\n[first token after {times.ttft:.2f} s, {times.tokens_per_second:.1f} tokens/s]")


if __name__ == "__main__":
    main()
