"""Stream a chat from a running server, with the OpenAI client.

vllm serve MODEL --block-manager avmp       # or: --config configs/tiny-jamba-cpu.yaml
python examples/chat.py "How long should green tea brew?"
"""

from __future__ import annotations

import sys

from openai import OpenAI


def main() -> None:
    question = sys.argv[1] if len(sys.argv) > 1 else "How long should green tea brew?"
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=64,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
