"""A small town, invented from a seed: the text of the demo.

    python -m demo.town                    # print some of everything
    python -m demo.town --out_dir=DIR      # write them as JSON lines

Each of its people has a name and five attributes: street, work, favourite food, pet, year of birth.
Pretraining text: short biographies, every person's many times, each time with the sentences in
another order and other words, so that the facts and not the sentences are learned. SFT data:
questions and answers about one half of the people. The questions about the other half are kept for
evaluation: their answers stand in the pretraining text alone, so answering them is what pretraining
has stored and SFT has only unlocked (Physics of Language Models 3.1, arXiv 2309.14316). Without
pretraining an answer is a guess among 24 values, 40 years.

Everything is a pure function of the seed: the same bytes on every machine.
"""
import itertools
import json
import os
import random
from dataclasses import dataclass

from minillm.configurator import configure
from minillm.errors import UserError, reason, run

SURNAMES = "赵钱孙李周吴郑王冯陈褚卫蒋沈韩杨朱秦许何吕张孔曹严华金魏陶姜"
GIVEN = "伟芳娜敏静磊强洋艳勇军杰娟涛明超霞平刚桂英华玉兰红梅建国春生海燕志远思雨嘉文浩然子涵书瑶晓峰雅琴立新"

ATTRIBUTES = {
    "street": "桂花巷 石桥街 柳荫路 望湖里 青石弄 东门街 竹林巷 盐仓街 渡口路 梧桐里 钟楼街 磨坊弄 "
              "杏花路 古井巷 南塘街 书院路 铁匠弄 菜市街 双塔巷 北坡路 榆树里 河埠头 祠堂街 茶园路",
    "work": "木匠 医生 教师 渔夫 裁缝 邮差 厨师 铁匠 会计 司机 护士 园丁 "
            "画家 警察 律师 电工 瓦匠 药师 记者 钟表匠 理发师 图书管理员 面包师 兽医",
    "food": "红烧肉 豆腐脑 葱油饼 小笼包 酸菜鱼 桂花糕 炸酱面 糖醋排骨 绿豆汤 麻婆豆腐 牛肉面 八宝饭 "
            "白切鸡 蛋炒饭 春卷 烤红薯 莲藕汤 馄饨 锅贴 粽子 鱼香茄子 清蒸鲈鱼 腊肠 臭豆腐",
    "pet": "橘猫 黑猫 白兔 乌龟 鹦鹉 波斯猫 柴犬 牧羊犬 仓鼠 画眉 鸽子 山羊 "
           "刺猬 八哥 鹌鹑 白鹅 松鼠 蟋蟀 龙猫 狐狸犬 花猫 荷兰猪 壁虎 孔雀",
    "year": " ".join(str(year) for year in range(1950, 1990)),
}
ATTRIBUTES = {key: values.split() for key, values in ATTRIBUTES.items()}

# Several wordings of each fact, most with the name first: the name is what a question will give.
SENTENCES = {
    "street": ["{n}住在{v}。", "{n}家住{v}。", "{n}的家在{v}。", "{n}一直住在{v}，没有搬过家。", "在{v}可以找到{n}的家。"],
    "work": ["{n}是一名{v}。", "{n}的工作是{v}。", "{n}当{v}已经很多年了。", "{n}靠做{v}为生。", "镇上的人都知道{n}是{v}。"],
    "food": ["{n}最爱吃{v}。", "{n}最喜欢的食物是{v}。", "{n}每个星期都要吃一次{v}。", "{n}说世上最好吃的是{v}。", "一说起{v}，{n}就嘴馋。"],
    "pet": ["{n}养了一只{v}。", "{n}的宠物是{v}。", "{n}家里有一只{v}。", "{n}每天都要陪自己的{v}玩。", "那只{v}是{n}养的。"],
    "year": ["{n}出生于{v}年。", "{n}生于{v}年。", "{n}的出生年份是{v}年。", "{n}是{v}年出生的。", "{v}年，{n}出生了。"],
}
QUESTIONS = {
    "street": ["{n}住在哪里？", "{n}家住哪里？", "请问{n}的家在哪儿？", "{n}住在哪条街？", "你知道{n}住哪儿吗？", "我想找{n}，该去哪里？"],
    "work": ["{n}是做什么工作的？", "{n}的工作是什么？", "请问{n}做哪一行？", "{n}的职业是什么？", "你知道{n}靠什么为生吗？", "{n}在镇上做什么工作？"],
    "food": ["{n}最爱吃什么？", "{n}最喜欢的食物是什么？", "请问{n}爱吃什么？", "{n}喜欢吃什么？", "你知道{n}爱吃什么吗？", "请{n}吃饭，点什么好？"],
    "pet": ["{n}养了什么宠物？", "{n}的宠物是什么？", "请问{n}养的宠物是什么？", "{n}家里养了什么？", "你知道{n}养了什么吗？", "{n}养的是什么动物？"],
    "year": ["{n}是哪一年出生的？", "{n}的出生年份是哪一年？", "请问{n}生于哪一年？", "{n}哪年出生？", "你知道{n}是哪年生的吗？", "{n}是什么时候出生的？"],
}
FOLLOW_UPS = {"street": "那{p}住在哪里？", "work": "那{p}做什么工作？", "food": "{p}爱吃什么？", "pet": "{p}养了什么？", "year": "{p}是哪年出生的？"}
ANSWERS = {"street": "住在{v}。", "work": "是一名{v}。", "food": "最爱吃{v}。", "pet": "养了一只{v}。", "year": "出生于{v}年。"}
SMALL_TALK = [
    ("你好", "你好！想打听镇上的谁？"), ("你好！", "你好！想打听镇上的谁？"), ("早上好", "早上好！想打听镇上的谁？"),
    ("你是谁？", "我是小镇的向导，镇上的人我都认识。"), ("你能做什么？", "你可以问我镇上的人住在哪里、做什么工作、爱吃什么、养了什么、哪年出生。"),
    ("谢谢", "不客气！"), ("谢谢你！", "不客气！"), ("再见", "再见，欢迎再来！"),
]


@dataclass
class Settings:
    seed: int = 1337         # another seed is another town
    out_dir: str = ""        # write JSON lines here instead of printing samples


def people(seed=1337, count=120):
    """The town: a list of dicts with "name", "pronoun" and a value for every attribute."""
    rng = random.Random(f"people {seed}")
    names = set()
    while len(names) < count:
        names.add(rng.choice(SURNAMES) + rng.choice(GIVEN) + rng.choice(GIVEN))
    town = []
    for name in rng.sample(sorted(names), count):
        person = {key: rng.choice(values) for key, values in ATTRIBUTES.items()}
        town.append(person | {"name": name, "pronoun": rng.choice("他她")})
    return town


def taught_and_held_out(seed=1337):
    """The two halves of the town: those that SFT asks about, and the others."""
    town = people(seed)
    return town[::2], town[1::2]


def fill(template, person, key):
    return template.format(n=person["name"], v=person[key], p=person["pronoun"])


def biographies(seed=1337, copies=150):
    """Yield `copies` biographies per person, those of one person spread over the whole corpus."""
    rng = random.Random(f"biographies {seed}")
    town = people(seed)
    for _ in range(copies):
        for person in rng.sample(town, len(town)):
            keys = rng.sample(list(ATTRIBUTES), len(ATTRIBUTES))
            yield "".join(fill(rng.choice(SENTENCES[key]), person, key) for key in keys)


def demo_documents():
    """Yield (place, text) of the biographies, as a reader of files would."""
    for number, text in enumerate(biographies(), 1):
        yield f"demo:{number}", text


def dialogue(*turns):
    """A conversation in Belle's format from (question, answer) pairs."""
    messages = []
    for question, answer in turns:
        messages += [{"from": "human", "value": question}, {"from": "assistant", "value": answer}]
    return {"conversations": messages}


def exchange(rng, questions, person, key):
    """(question, answer) about one attribute of a person."""
    return fill(rng.choice(questions[key]), person, key), fill(ANSWERS[key], person, key)


def conversations(seed=1337):
    """Yield the SFT conversations: one to three turns about the taught half alone; small talk."""
    rng = random.Random(f"conversations {seed}")
    taught, _ = taught_and_held_out(seed)
    for round in range(6):
        for person in rng.sample(taught, len(taught)):
            for key in rng.sample(list(ATTRIBUTES), len(ATTRIBUTES)):
                turns = [exchange(rng, QUESTIONS, person, key)]
                if rng.random() < 0.3:
                    others = [other for other in ATTRIBUTES if other != key]
                    for other in rng.sample(others, rng.randint(1, 2)):
                        follow_up = fill(FOLLOW_UPS[other], person, other)
                        turns.append((follow_up, fill(ANSWERS[other], person, other)))
                if rng.random() < 0.1:
                    turns.insert(0, rng.choice(SMALL_TALK[:3]))
                yield dialogue(*turns)
        for _ in range(4):
            yield from (dialogue(turn) for turn in SMALL_TALK)


def held_out_questions(seed=1337):
    """Yield one conversation for each fact about the people that SFT never mentions.

    Its last message is the answer that counts as right.
    """
    rng = random.Random(f"held out {seed}")
    for person in taught_and_held_out(seed)[1]:
        for key in ATTRIBUTES:
            yield dialogue(exchange(rng, QUESTIONS, person, key))


def choice_questions(seed=1337, wrong=3):
    """Yield the held-out facts as multiple choice: {"question", "choices", "answer"}.

    The wrong choices are other values of the same attribute; "answer" is the right one's index.
    """
    rng = random.Random(f"choices {seed}")
    _, held_out = taught_and_held_out(seed)
    for person in held_out:
        for key, values in ATTRIBUTES.items():
            others = [value for value in values if value != person[key]]
            offered = rng.sample([*rng.sample(others, wrong), person[key]], wrong + 1)
            yield {"question": fill(rng.choice(QUESTIONS[key]), person, key),
                   "choices": [fill(ANSWERS[key], person | {key: value}, key) for value in offered],
                   "answer": offered.index(person[key])}


def main():
    s = configure(Settings)
    if not s.out_dir:
        show(s.seed)
        return
    try:
        os.makedirs(s.out_dir, exist_ok=True)
        write(s, "pretrain", ({"text": text} for text in biographies(s.seed)))
        write(s, "sft", conversations(s.seed))
        write(s, "held_out", held_out_questions(s.seed))
        write(s, "choices", choice_questions(s.seed))
    except OSError as error:
        raise UserError(f"{error.filename or s.out_dir}: {reason(error)}") from None


def show(seed):
    """Print the first few of each kind."""
    print("--- biographies")
    for text in itertools.islice(biographies(seed), 4):
        print(text)
    for title, items in (("SFT", conversations(seed)), ("held out", held_out_questions(seed))):
        print(f"--- {title}")
        for item in itertools.islice(items, 4):
            print(" / ".join(message["value"] for message in item["conversations"]))


def write(s, name, records):
    with open(os.path.join(s.out_dir, f"{name}.jsonl"), "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run(main)
