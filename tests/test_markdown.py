"""What others have written, in a card, a report and `comcat info`: it is seen as it is, and breaks nothing."""

import shlex

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from safetensors.torch import save_file

from comcat_diffusion.adapters.header import Header, Notes
from comcat_diffusion.cli import main
from comcat_diffusion.export.card import Shared, card
from comcat_diffusion.markdown import code, quoted, shown, table, text

# Learned words, and names of files, that mean something in markdown, in YAML or to a terminal.
WORDS = [
    "<my-dog>", "<!-- dog", "a|b", "*sks*", "**sks**", "_sks_", "__init__", "sks_dog", "`sks`", "a ``b` c", "[sks](x)",
    "![sks](x)", "# sks", "1. sks", "12) sks", "- sks", "+ sks", "> sks", "~~sks~~", "&lt;sks&gt;", "&amp;", "sks\\",
    "\\*", "$x$", "---", "===", '"sks"', "'sks'", "sks: dog", "ハチ公 🐕", "{sks}", "%s",
]  # fmt: skip


class Seen(list):
    """What a reader sees of markdown: (kind of the block, its words) in order."""

    def __init__(self, source):
        tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(source)
        for before, token in zip([None, *tokens], tokens, strict=False):
            if token.type == "inline":
                # marks, links and tags show nothing of themselves
                shows = [
                    part.content for part in token.children if part.type in ("text", "code_inline", "text_special")
                ]
                self.append((before.type.removesuffix("_open"), "".join(shows)))
            elif token.type in ("code_block", "fence"):
                self.append(("code", token.content))

    def of(self, kind):
        return [words for block, words in self if block == kind]


@pytest.mark.parametrize("words", WORDS)
def test_words_are_seen_as_they_are_wherever_they_stand(words):
    assert Seen(text(words)) == [("paragraph", words)]
    assert Seen(code(words)) == [("paragraph", words)]
    assert Seen(shown(words)) == [("paragraph", words)]
    assert Seen(f"# {text(words)}, evaluated") == [("heading", f"{words}, evaluated")]
    assert Seen(f"- {text(words)}\n- next") == [("paragraph", words), ("paragraph", "next")]


@pytest.mark.parametrize("words", WORDS)
def test_a_table_has_the_cells_that_it_was_given(words):
    made = Seen(table([("", "bytes"), (words, "1"), ("after", "0.1 [0.0, 0.2]")]))
    assert made.of("td") == [words, "1", "after", "0.1 [0.0, 0.2]"]
    assert Seen(f"| a | b |\n| --- | --- |\n| x | {code(words, in_table=True)} |").of("td") == ["x", words]


def test_plain_words_stay_plain():
    for words in ("before", "checkpoint-100/sks-teddy x 0.5", "sks_dog.safetensors", "a photo of sks dog, big (red)"):
        assert text(words) == shown(words) == words


def test_nothing_reaches_a_terminal_but_letters():
    assert shown("a\x1b[31mb\nc\td\x07") == "`a\ufffd[31mb c d\ufffd`"


@pytest.mark.parametrize(
    "words", [*WORDS, "two\nlines", "tab\there", "\x00\x1b\x7f\x85\u2028\ufeff", "---\nevil: true"]
)
def test_a_quoted_string_is_one_of_yaml_and_of_python(words):
    assert yaml.safe_load(f"key: {quoted(words)}") == {"key": words}
    assert eval(quoted(words)) == words and "\n" not in quoted(words)


def carded(trigger, name="sks-dog.safetensors", base="somebody/base", training=None):
    notes = Notes(trigger, f"a photo of {trigger} dog", "dog", training or {})
    header = Header({"unet": {"r": 2, "foldable": True}}, base, "", {}, notes, {"torch": "2"})
    return card(header, Shared("me/my-dog", name, 1000, lora=name, words=(name,)))


@pytest.mark.parametrize("trigger", [*WORDS, "$(rm -rf x)", "`rm`", "wow!"])
def test_a_card_shows_every_learned_word_and_keeps_its_form(trigger):
    made = carded(trigger, training={"note": trigger})
    front = ModelCard(made).data
    assert front.instance_prompt == f"a photo of {trigger} dog" and front.base_model == "somebody/base"
    seen = Seen(made.split("---\n", 2)[2])
    assert [words for kind, words in seen if kind == "heading"] == [f"{trigger} dog", "Where it works", "Use", "Facts"]
    paragraphs = seen.of("paragraph")
    assert any(f"Write {trigger} dog in a prompt" in words for words in paragraphs)
    assert any(f"choose it with strength 1, and write {trigger} dog." in words for words in paragraphs)
    cells = seen.of("td")
    assert cells[cells.index("training") + 1] == f"note {trigger}"
    facts = cells[cells.index("file") :]
    assert [facts[n] for n in (0, 2, 4, 6)] == ["file", "adapter of unet", "training", "written by"]
    shell, python = seen.of("code")
    assert shlex.split(shell.splitlines()[1])[-1] == f"a photo of {trigger} dog"
    (prompt,) = [line for line in python.splitlines() if line.startswith("pipe(")]
    assert eval(prompt.removeprefix("pipe").removesuffix(".images[0]")) == f"a photo of {trigger} dog"


@pytest.mark.parametrize("name", ["a|b.safetensors", "my dog.safetensors", "a`b.safetensors", "$x.safetensors"])
def test_a_card_names_every_file_as_it_is(name):
    seen = Seen(carded("sks", name).split("---\n", 2)[2])
    cells = seen.of("td")
    assert cells[1] == cells[3] == name and cells[5] == f"{name}, 1,000 bytes"
    assert shlex.split(seen.of("code")[0].splitlines()[1])[3] == name
    assert any(f"put {name} into" in words for words in seen.of("paragraph"))


def test_info_shows_a_learned_word_also_where_it_is_pasted(tmp_path, capsys):
    notes = Notes("<my-dog>", "a photo of <my-dog> dog", "dog", {})
    header = Header({"unet": {"r": 2, "target_modules": ["attn2"]}}, "a/b", "", {}, notes, {}, tokens=["<my-dog>"])
    file = tmp_path / "x.safetensors"
    save_file({}, file, metadata=header.metadata())
    assert main(["info", str(file)]) == 0
    told = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    for name, words in (("subject", "<my-dog> dog"), ("prompt", "a photo of <my-dog> dog"), ("new words", "<my-dog>")):
        assert Seen(told[name].strip()) == [("paragraph", words)]
    assert told["base"].strip() == "a/b"
