"""Separates the reasoning that models write between tags before an answer from the answer, incrementally.

<think>…</think>…      DeepSeek-R1, QwQ, Qwen3; some chat templates end with the opening tag
[THINK]…[/THINK]…      Magistral
"""

import regex  # matches partially, unlike re

TAGS = {"<think>": "</think>", "[THINK]": "[/THINK]"}
MARKERS = (*TAGS, *TAGS.values())
OPENING_TAG = regex.compile(rf"\s*+(?P<tag>{'|'.join(map(regex.escape, TAGS))})")
OPENING_TAG_AT_END = regex.compile(rf"(?P<tag>{'|'.join(map(regex.escape, TAGS))})\s*+$")
CLOSING_TAG = {tag: regex.compile(rf"(?<!\s)\s*+{regex.escape(close)}") for tag, close in TAGS.items()}


class ReasoningParser:
    """Separates reasoning at the start of the generated text from the answer after it.

    White space around the tags is dropped. If the closing tag is missing, all of the text is reasoning.
    """

    def __init__(self, prompt: str) -> None:
        """If `prompt`, the end of the prompt, ends with an opening tag, the generated text begins within reasoning."""
        match = OPENING_TAG_AT_END.search(prompt)
        self.tag = match["tag"] if match else None
        self.state = "start"  # then "opened" (after the opening tag), "reasoning", "closed" (after the other), "answer"
        self.buffer = ""  # text that is not parsed yet

    def push(self, text: str, *, is_final: bool = False) -> tuple[str, str]:
        """Parses more text. Returns the new part of the reasoning and of the answer."""
        if self.state == "answer":
            return "", text
        self.buffer += text
        reasoning = ""
        if self.state == "start":
            match = OPENING_TAG.match(self.buffer, partial=True)
            if match is not None and match.partial and not is_final:
                return "", ""
            if match is not None and not match.partial:
                self.tag, self.buffer = match["tag"], self.buffer[match.end() :]
            self.state = "answer" if self.tag is None else "opened"
        if self.state == "opened":
            self.buffer = self.buffer.lstrip()
            self.state = "reasoning" if self.buffer else "opened"
        if self.state == "reasoning":
            match = CLOSING_TAG[self.tag or ""].search(self.buffer, partial=True)
            end = len(self.buffer) if match is None or (match.partial and is_final) else match.start()
            reasoning, self.buffer = self.buffer[:end], self.buffer[end:]
            if match is not None and not match.partial:
                self.state, self.buffer = "closed", self.buffer[match.end() - end :]
            reasoning = reasoning.rstrip() if is_final and self.state == "reasoning" else reasoning
        if self.state == "closed":
            self.buffer = self.buffer.lstrip()
            self.state = "answer" if self.buffer else "closed"
        answer = ""
        if self.state == "answer":
            answer, self.buffer = self.buffer, ""
        return reasoning, answer
