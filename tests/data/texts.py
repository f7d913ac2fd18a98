"""Text for tests: many scripts, and what trips byte accounting; a tokenizer trained on some of it."""

from pathlib import Path
from typing import Any

from lib.data.config import NO_FILE, ExpectParams, TokenizeParams
from lib.data.tokenizer import Tokenizer
from lib.data.tokenizer_training import train_tokenizer

ENGLISH = (
    "The ship left the harbour before dawn, and nobody on the quay knew where it was bound. "
    "Its captain had paid for water, rope and bread; he asked for no map.\n\n"
    "    indented line\n\tline after a tab\n"
    "By noon the wind had turned, the sails hung loose, and the crew sat in the shade counting 1234 gulls. "
    "\"What do we do now?\" asked the youngest.  \"We wait,\" said the oldest.\n"
)

SCRIPTS = {
    "Latin": "Zażółć gęślą jaźń — ça va? Þórður, İstanbul, straße",
    "Greek": "Το πλοίο έφυγε πριν από την αυγή",
    "Cyrillic": "Корабль вышел до рассвета",
    "Armenian": "Նավը մեկնեց լուսաբացից առաջ",
    "Hebrew": "הספינה עזבה לפני עלות השחר",
    "Arabic": "غادرت السفينة قبل الفجر ١٢٣",
    "Devanagari": "जहाज़ भोर से पहले निकल गया",
    "Tamil": "கப்பல் விடியலுக்கு முன் புறப்பட்டது",
    "Thai": "เรือออกก่อนรุ่งสาง",
    "Tibetan": "གྲུ་གཟིངས་ཐོན་སོང་",
    "Georgian": "გემი გამთენიამდე გავიდა",
    "Amharic": "መርከቡ ከንጋት በፊት ሄደ",
    "Khmer": "កប៉ាល់បានចេញមុនពេលព្រលឹម",
    "Hangul": "배는 새벽 전에 떠났다",
    "decomposed Hangul": "\u1107\u1162",
    "Japanese": "船は夜明け前に出た。カタカナ",
    "Han": "船在黎明前離開了　全角空格",
    "Han beyond the basic plane": "𠀀𠀁𪜀",
    "Gothic": "𐌲𐌿𐍄𐌹𐍃𐌺",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇮🇸",
    "combining marks": "e\u0301 a\u0308\u0323 Z\u0351\u036b\u0343",
    "white space": "a\u00a0b\u2003c\u3000d\u200be\r\nf\tg\vh\fi\u2028j",
    "controls": "a\x00b\x01c\x7fd\x85e\ufefff\ufffdg\uffffh",
    "special pieces": "<s></s><unk><pad><0x41> \u2047 \u2585 \u2580",
    "runs of spaces": "a  b   c    d        e \n   \n  f  ",
    "nothing but newlines": "\n\n\n",
}

TINY_VOCAB_SIZE = 700

TINY_PARAMS: dict[str, Any] = {
    "source": "jsonl", "path": "documents.jsonl", "pattern": "*.jsonl*", "val_path": NO_FILE,
    "heldout_path": NO_FILE, "packages": [], "min_document_bytes": 1, "heldout_fraction": 0.2,
    "val_fraction": 0.2, "tokenizer": None, "vocab_size": TINY_VOCAB_SIZE, "tokenizer_training_bytes": 100_000, "shard_tokens": 1000,
    "hub": {"repo": "owner/data", "revision": "main", "dataset": "tiny", "start": "shards", "train_shards": 2}, "val_documents": None,
    "case_transform": False, "expect": dict.fromkeys(ExpectParams.model_fields),
}


def tiny_params(**changes: object) -> TokenizeParams:
    """Parameters for a small corpus."""
    return TokenizeParams.model_validate(TINY_PARAMS | changes, strict=False)


def cased_tokenizer() -> Tokenizer:
    """As `tiny_tokenizer`, for text whose capitals are written as operators."""
    model = train_tokenizer([ENGLISH, *SCRIPTS.values()], TINY_VOCAB_SIZE, 100_000, case_transform=True)
    return Tokenizer(model, Path("cased.model"))


def tiny_tokenizer() -> Tokenizer:
    """A lossless tokenizer with pieces of several letters, bytes or spaces in many scripts."""
    return Tokenizer(train_tokenizer([ENGLISH, *SCRIPTS.values()], TINY_VOCAB_SIZE, 100_000), Path("tiny.model"))
