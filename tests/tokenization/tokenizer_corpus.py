"""Texts that tokenizers get wrong: many scripts, code, emoji, odd whitespace, special tokens inside text."""

PROSE = [
    "The quick brown fox jumps over the lazy dog, doesn't it? I'll say we've SEEN THAT; they're sure.",
    "帮我制定一份去上海的旅游攻略",
    "我们在北京的胡同里吃了炸酱面，味道很好！价格：¥38.50（约合5美元）。",
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。カタカナとｶﾅ",
    "모든 국민은 법 앞에 평등하다. 누구든지 성별·종교 또는 사회적 신분에 의하여 차별을 받지 아니한다.",
    "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق. ١٢٣٤٥",
    "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם. שָׁלוֹם",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। १२३",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ๑๒๓",
    "Все люди рождаются свободными и равными в своём достоинстве и правах. Ёлка!",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα. ΣΊΣΥΦΟΣ ς",
    "Ünïcödé façade naïve coöperate Straße İstanbul ǅ Æther Ǆ ñandú",
    "Tiếng Việt: Tất cả mọi người sinh ra đều được tự do và bình đẳng.",
    "ยินดีต้อนรับ ကြိုဆိုပါတယ် ក្រសួង ໂລກ བོད་སྐད་ ᠮᠣᠩᠭᠣᠯ አማርኛ ქართული Հայերեն",
]

MARKS = [
    "cafe\u0301 e\u0301\u0323 a\u030a A\u030a n\u0303 \u1e9b\u0323 q\u0307\u0323",  # decomposed
    "caf\u00e9 \u00e5 \u00c5 \u212b \u2126 \ufb01 \u00bd \u2075 \uff21\uff22\uff11",  # composed
    "\u1100\u1161\u11a8 \uac01 \u0958 \u0915\u093c \u0f43 \u0344",  # jamo and singletons that NFC changes
    "Z\u0351\u036b\u0343\u036a\u0302a\u0328\u0349l\u0321\u034a\u0351g\u0321\u0312o\u0322\u030c",
    "\u0301 alone, \u200dalone, a\u200bb\u200cc\u2060d\ufeffe",
]

EMOJI = [
    "👍 👍🏽 🤷🏽‍♀️ 👨‍👩‍👧‍👦 🏳️‍🌈 🇨🇭🇨🇳 ❤️ ❤ ☺️ 1️⃣ 🧑🏿‍🚀",
    "a😀b😃c 😀😀😀 🫠\U0001fae8\U0001f9cc 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛 𠮷野家 𓀀 𝄞",
]

CODE = [
    "def fib(n: int) -> int:\n    if n < 2:\n        return n\n    return fib(n - 1) + fib(n - 2)\n\n\n",
    'int main(void) {\n\tprintf("%d\\n", 0x1F + 1e-9);\n\treturn !(a&&b)||c--;\t// done\n}\r\n',
    "SELECT * FROM t WHERE a >= 10 AND b != 'x''y'; -- comment",
    "fn f<'a>(x: &'a str) -> Option<&'a str> { x.split(\"::\").nth(2) }",
    '<div class="x">&nbsp;<!-- 注释 --></div>\n{"key": [1, 2.5e+10, null, true], "嵌套": {"a": "\\u00e9"}}',
    "$ grep -rn 'foo\\|bar' ./src | awk '{print $1}' > /dev/null 2>&1",
    "https://example.com/a/b?c=d&e=%20#frag user@example.com C:\\Users\\me ../..//x",
    "\\frac{\\partial f}{\\partial x} = \\sum_{i=0}^{n} x_i^{2} ∀x∈ℝ: ⌈x⌉ ≥ x ≠ ∞",
]

WHITESPACE = [
    "",
    " ",
    "  ",
    "   leading",
    " one",
    "trailing ",
    "trailing   ",
    "a  b   c    d     e      f       g        h",
    "\n",
    "\n\n",
    "\n\n\n x",
    "x\n\ny\n \nz \n",
    "\t",
    "\t\tindented\tby\ttabs \t mixed",
    "a\r\nb\rc\n\rd\r\n\r\n",
    "no\u00a0break \u00a0 \u2003em\u2009thin\u3000ideographic\u2028line\u2029par\x85nel\x0bvt\x0cff",
    "\ufeffBOM first",
    "nul\x00inside\x00\x00 \x00",
    "\x01\x02\x1b[31mred\x1b[0m\x7f",
    "▁ ▁▁a▁b ▁",
    " \n \t ",
    " " * 40 + "x" + " " * 17,
    "\n" * 25,
]

NUMBERS = [
    "0 1 12 123 1234 12345 1234567890 3.14159 -17 +5 1,000,000 1e10 0xFF 2024-01-31 12:34:56",
    "½ ² ③ Ⅷ 一二三 ٣ ५ 𝟗 1st 2nd x1y22z333",
    "$5.00 €20 £3 ¥100 50% #1 No. 7",
]

CONTRACTIONS = [
    "I'm you're he's she'd we'll they've isn't CAN'T I'LL WE'RE 'S 'T rock'n'roll o'clock 'tis ''' 's't're",
    "I’m don’t “quoted” ‘single’ — dash – en… ellipsis",
]

# Each vocabulary knows some of these; for the others they are plain text.
SPECIAL = [
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "a<|im_end|>b <|im_end|> c<|endoftext|><|endoftext|>d",
    "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] More [/INST]",
    "<s>a</s>b <s> c </s> d<unk>e<pad>",
    '<tool_call>\n{"name": "f"}\n</tool_call> <|fim_prefix|>x<|fim_suffix|>',
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "<0x0A> <0x41>b <|im_end <|im_endx|> < |im_end|> <S>",
]

MIXED = [
    "Hello, 世界! Привет мир, שלום עולם 🌍🌎🌏 12:30\tOK\n",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa bbbbbbbbbbbb ababababababab",
    "........ !!!!! ????? ----- ===== ##### *** ~~~ ...?!",
    "CamelCaseWord snake_case_word kebab-case-word SCREAMING_CASE mixedUP123abc",
    "x",
    "é",
    "你",
    "😀",
    "\U0010ffff \ue000 \ufffd \ufffe",
]

TEXTS = [*PROSE, *MARKS, *EMOJI, *CODE, *WHITESPACE, *NUMBERS, *CONTRACTIONS, *SPECIAL, *MIXED]
