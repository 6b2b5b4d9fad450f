"""Cleaning counts what it leaves out, repairs mojibake, and keeps healthy text of any language byte for byte."""

import json

import pytest

from config import UserError
from config.schema import DataConfig
from data.cleaning import Counts, clean
from data.stories import open_stories


def write_jsonl(path, texts):
    path.write_bytes("".join(json.dumps({"text": text}) + "\n" for text in texts).encode("utf-8"))
    return path


def opened(path, **options):
    return open_stories(DataConfig(dataset=str(path), validation="sample", **options), "train")


def test_cleaning_is_counted(tmp_path):
    cut = "Once upon a time, there was"
    records = ["  A whole story.\n", "", " \n ", cut, cut + " a boy" * 20, "He said, “Yes”", "donâ€™t go.", "lost �.",
               "half \ud83d of it."]
    source = opened(write_jsonl(tmp_path / "a.jsonl", records))
    assert list(source) == ["A whole story.", cut + " a boy" * 20, "He said, “Yes”", "don’t go."]
    counts = {"stories": 4, "empty": 2, "cut_off": 1, "repaired": 1, "unreadable": 2}
    assert {key: source.counts[key] for key in counts} == counts
    list(source)
    assert {key: source.counts[key] for key in counts} == counts, "of the last iteration alone"


def test_without_cleaning_only_the_empty_are_dropped(tmp_path):
    texts = [" Once upon\n", "donâ€™t", "lost �"]
    source = opened(write_jsonl(tmp_path / "a.jsonl", [*texts, " "]), clean=False)
    assert list(source) == texts
    assert source.counts["empty"] == 1
    path = write_jsonl(tmp_path / "half.jsonl", ["A.", "half \ud83d"])
    with pytest.raises(UserError) as caught:
        list(opened(path, clean=False))
    message = str(caught.value)
    assert str(path) in message and "story 2" in message and "data.clean" in message


@pytest.mark.parametrize("end", list(".!?…\"'”’»)。！？｡।॥؟۔։」』】"))
def test_a_short_story_that_is_closed_is_kept(tmp_path, end):
    path = write_jsonl(tmp_path / "a.jsonl", [f"He went home{end}", f"She too{end}", "He went"])
    assert list(opened(path)) == [f"He went home{end}", f"She too{end}"]


@pytest.mark.parametrize(("damaged", "whole"), [
    ("He said, â€œHi!â€\x9d and left.", "He said, “Hi!” and left."),
    ("He said, â€œHi!â€ and left.", "He said, “Hi!” and left."),  # the byte that cp1252 does not have is lost
    ("He said, â€œHi!â€\nâ€œOh!â€", "He said, “Hi!”\n“Oh!”"),
    ("I donâ€™t know the cafÃ© â€” yetâ€¦", "I don’t know the café — yet…"),
    ("“Hello,” said Zoë. â€œHi!â€\x9d", "“Hello,” said Zoë. “Hi!”"),
])
def test_mojibake_is_repaired(tmp_path, damaged, whole):
    source = opened(write_jsonl(tmp_path / "a.jsonl", [damaged]))
    assert list(source) == [whole]
    assert source.counts["repaired"] == 1


@pytest.mark.parametrize("text", [
    "“Hello,” said Zoë — naïve café, Ñandú. ‘Yes’… «Oui» à la carte, Ça va?",
    "Smile 😀 👩‍👩‍👧 and a ﬁsh’s “ﬂag” – ½ of it.",  # fix_text would undo the ligatures and the quotes
    "مرحبا بالعالم. Привет, мир. 日本語です. Ελληνικά. עברית.",
    "Straße, Ærø, Łódź, İstanbul, Ångström, œuvre, ¿Qué? ¡Sí!",
])
def test_genuine_text_is_left_alone(tmp_path, text):
    source = opened(write_jsonl(tmp_path / "a.jsonl", [text]))
    assert list(source) == [text]
    assert source.counts["repaired"] == source.counts["unreadable"] == 0


HEALTHY = {
    "English": ["“Hello,” said Tom. ‘Oh!’", "It's a café — \"naïve\", isn’t it?"],
    "Swedish": ["”Är du där?” frågade Åsa.", "»Är det du?» sa Örjan. ”Å nej!” ”Ä”"],
    "Finnish": ["”Älä mene!” Äiti huusi. ”HYVÄÄ YÖTÄ”", "’Ä’ ja ’Ö’."],
    "Danish": ["»Ær du her?« spurgte Åge. „Å“"],
    "German": ["„Äpfel sind gut“, sagte Ömer. ‚Ü‘", "»Öl« und «Ä»"],
    "French": ["« Ça va ? » dit-il. «Été» “À LA CARTE” ‹É›"],
    "Portuguese": ["A ma\u00e7\u00e3 caiu. “MA\u00c7\u00c3” «MA\u00c7\u00c3» ‘M\u00c3’ „M\u00c3“ disse João."],
    "Spanish": ["—¿Dónde está Ñandú? «¡Aquí!» “ÑOÑO”"],
    "Turkish": ["“İyi günler,” dedi Çağla. ‘Şimdi mi?’ “AÇ”"],
    "Vietnamese": ["“Con mèo đâu rồi?” bé Ánh hỏi. “Ở ĐÂY Ạ”"],
    "Polish": ["„Żółć”, rzekł Łukasz. „ŻÓŁĆ”"],
    "Russian": ["«Где ты?» — спросил Ёжик. „Тут“."],
    "Greek": ["«Πού είσαι;» ρώτησε η Άννα. «Ά»"],
    "Arabic": ["قالت: «أين أنت؟» ثم ضحكت."],
    "Hebrew": ["”איפה אתה?“ שאלה דנה."],
    "Hindi": ["“तुम कहाँ हो?” राधा ने पूछा।"],
    "Bengali": ["“তুমি কোথায়?” সে বলল।"],
    "Thai": ["“เธออยู่ไหน” แม่ถาม ฯ."],
    "Chinese": ["“你在哪里？”小明问。", "他说：「我在这里！」"],
    "Japanese": ["「どこにいるの？」とケンは聞いた。『ここ』"],
    "Korean": ["“어디 있니?” 하고 물었다. ‘여기.’"],
    "emoji": ["Hi 😀👍🏽 “ok” 👨‍👩‍👧."],
}


@pytest.mark.parametrize("language", HEALTHY)
def test_healthy_text_of_any_language_is_kept_byte_for_byte(language):
    for text in HEALTHY[language]:
        for story in (text, f"{text}\n{text} {text}"):
            counts = Counts()
            assert clean(story, counts, short_is_cut_off=False) == story and not counts


def test_a_repair_beside_a_sound_quotation_leaves_its_marks():
    counts = Counts()
    damaged = "“MA\u00c7\u00c3” disse TomÃ¡s, â€œsimâ€\x9d, e foi ao HÃ”TEL. ”Är du?”"
    assert clean(damaged, counts) == "“MA\u00c7\u00c3” disse Tomás, “sim”, e foi ao HÔTEL. ”Är du?”"
    assert counts["repaired"] == 1 and counts.examples["repaired"] == damaged[:60]


def test_a_list_of_short_items_is_kept(tmp_path):
    names = [f"name{number}" for number in range(300)]
    source = opened(write_jsonl(tmp_path / "names.jsonl", names))
    assert list(source) == names and source.counts["cut_off"] == 0


def test_a_few_lost_characters_do_not_cost_a_long_document(tmp_path):
    book = "It was a long day, and they went home. " * 200
    source = opened(write_jsonl(tmp_path / "a.jsonl", [book + "\ufffd end.", "Too \ufffd short."]))
    assert list(source) == [book + "\ufffd end."]
    assert source.counts["unreadable"] == 1 and "Too" in source.counts.examples["unreadable"]
