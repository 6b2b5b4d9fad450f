"""Offline stories in the manner of TinyStories, for the quickstart and the tests: no download, no end, no two alike.

A story is an opening, a plot and perhaps a closing line. OPENINGS and PLOTS are text to be read: one beat a line, its
phrasings separated by " | ", the people and things in it written as {slots}. The first character of a line says how it
is used: ">" starts a paragraph, "?" is told in half of the stories, "&" only when a pet is along, "|" goes on with the
phrasings of the line above. A new plot is a new entry in PLOTS, nothing else.
"""
from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

WORDS = {  # slots: what can fill them; where there are several slots, what fills them together
    "girl": "Lily,Mia,Sue,Anna,Lucy,Sara,Emma,Amy,Ella,Molly,Kate,Jane,Zoe,Nina,Lola,Emily,Polly,Betty,Alice,Mary,Tina",
    "boy": "Tom,Ben,Tim,Max,Sam,Jack,Leo,Bob,Joe,Dan,Finn,Luke,Noah,Adam,Oscar,Henry,Peter,Toby,Fred,Billy,Jake,Paul",
    "trait": "little,little,happy,kind,curious,clever,friendly,cheerful,honest,eager,young,sweet",
    "pet": "dog,cat,puppy,kitten,parrot,hamster",  # these three lists share no animal, so that no fox can meet a fox
    "wild": "rabbit,mouse,fox,bear,owl,frog,squirrel,hedgehog,elephant,turtle,otter,monkey,panda,lion,penguin,unicorn",
    "young": "lamb,duckling,piglet,fawn,bunny,chick,gosling,calf,foal,cub",
    "parent:p_he:p_him": "mom:she:her,dad:he:him,grandma:she:her,grandpa:he:him",
    "seller": "baker,farmer,shopkeeper,policeman,fisherman",
    "place": "park,lake,farm,beach,playground,pond,river,school",
    "landmark": "forest,sea,hill,mountain,bridge,castle,mill,village,stream,meadow",
    "home": "small house,little cottage,cozy cabin,old house,tall tower,tiny hut,yellow house",
    "color": "red,blue,green,yellow,orange,purple,pink,white,brown,golden,gray,silver",
    "toy": "ball,doll,kite,drum,robot,truck,train,puppet,balloon,plane,boat,wagon",
    "garment": "hat,coat,scarf,sweater,apron,cape,shirt,jacket,vest",
    "food": "apple,sandwich,cookie,muffin,banana,pancake,carrot,bun,pear,pretzel",
    "treats": "cookies,berries,grapes,cherries,nuts,cupcakes,candies,plums",
    "plants": "carrots,tomatoes,beans,peas,pumpkins,potatoes,onions,turnips",
    "fragile": "vase,cup,lamp,bowl,plate,jar,clock,teapot,mirror",
    "holder": "bag,box,bowl,basket,plate,jar",
    "hobby": "sing,dance,paint,draw,explore,read books,climb trees,pick flowers,tell stories,help others,count birds",
    "spot": "under the bed,behind the door,in the big box,under the table,behind the old chair,in the tall grass,"
            "inside the basket,under some leaves,behind the stairs,next to the window",
    "trap": "in the mud,in a deep hole,between two rocks,in a thorny bush,in a net,behind a heavy log",
    "shelter": "under the kitchen table,in the old barn,in a dry cave,in a tent of blankets",
    "gift:material": "card:paper and paint,necklace:beads and string,cake:flour and eggs,picture:paper and crayons,"
                     "scarf:soft wool,crown:paper and glue,pillow:cloth and thread,apple pie:apples and flour",
    "noise:cause": "tap tap:a branch on the glass,hoo hoo:a bird in the tree,bang:an open door,creak:the garden gate,"
                   "drip drip:the rain on the roof,whoosh:the wind in the trees,chirp chirp:a cricket on the wall",
    "skill:skilling:skilled:trouble":
        "swim:swimming in the lake:swam:the water felt too cold,skate:skating on the ice:skated:the ice was slippery,"
        "dance:dancing in the sun:danced:the steps were too fast,whistle:whistling a song:whistled:no sound came out,"
        "juggle:juggling three balls:juggled:the balls fell,ride a bike:riding a bike:rode the bike:the bike fell over",
}
DAYS = ("One day", "One day", "One Saturday", "One Sunday", "One fine day", "One bright day")
LATER = ("After breakfast", "Later that day", "After a while", "A little later")
_LIKES = """
{He} loved to {hobby}. | {name} loved to {hobby} and to {hobby2}. | Every day, {he} liked to {hobby}.
? {He} had {a_color2} {garment2} and wore it all the time. | {name} had many toys, but {he} liked {his} {toy} best."""
OPENINGS = (  # (parts of the whole, a pet is along, the day on which the plot begins, text)
    (10, False, DAYS, """
Once upon a time there was {a_hero} named {name}. | Once upon a time, there was {a_hero} named {name}.""" + _LIKES),
    (4, False, DAYS, """
In {a_home} near the {landmark} there lived {a_hero} named {name}. | There once was {a_hero} named {name}.
| {name} was {a_hero} who lived near the {landmark}.""" + _LIKES),
    (3, False, LATER, """
One day, {a_hero} named {name} woke up early. | One day, {a_hero} named {name} got up with the sun.
The sky was blue, and the birds sang. | It was a warm day. | {He} washed {his} face and ate {his} breakfast.
? {name} put on {his} {color2} {garment2}. "Today will be a good day," {he} said."""),
    (3, True, DAYS, """
{name} and {his} {pet} lived in {a_home} near the {landmark}. | {name} and {his} {pet} were best friends.
They did everything together. | They went everywhere together. | {name} loved to {hobby}, and the {pet} loved {name}.
? The {pet} slept next to {name}'s bed every night. | The {pet} was small, but it was very smart."""),
)
PLOTS = {
    "a lost toy": """
> {When}, {name} could not find {his} {color} {toy}. | {When}, {name} looked for {his} {color} {toy}, but it was gone.
It was {his} favorite toy, and {he} felt very sad. | {name} loved that {toy} so much that {he} began to cry.
? "Where is my {toy}?" asked {name}. | "Oh no! My {toy} is lost!" said {name}.
> {His} {parent} heard {him}. "Do not worry," {p_he} said. "We will look for it together."
They looked {spot}, but it was not there. | They looked {spot}. They found only an old sock.
& The {pet} looked, too. | The {pet} ran all over the house and looked, too.
? They looked for an hour. | "Think hard," said {his} {parent}. "Where did you play with it?"
> Then {name} saw something {color} {spot2}. It was the {toy}! | At last, they looked {spot2}. There was the {toy}!
"I found it!" said {name}. {He} jumped up and down. | {name} picked it up and held it tight. "Here you are!" {he} said.
{name} hugged {his} {parent}. "Thank you for your help," {he} said. | {His} {parent} smiled. "Well done," {p_he} said.
From that day on, {name} always put {his} toys away. | That night, {name} slept with the {toy} next to {his} bed.""",
    "sharing": """
> {When}, {name} had a {holder} of {treats}. | {When}, {name} sat under a tree with a {holder} of {treats}.
They smelled sweet, and {he} wanted to eat them all. | The {holder} was very full, and {name} was happy.
& The {pet} sat down and looked at the {holder}.
> {His} friend {friend} came by. "May I have some?" asked {friend}. | Then {his} friend {friend} said, "May I try one?"
"No! They are all mine!" said {name}. | {name} shook {his} head and held the {holder} tight. "No," {he} said.
{friend} did not say a word and sat down alone. | {friend} looked at the ground and felt sad.
> {name} ate one, but it was no fun to eat alone. | {name} felt bad. {His} {parent} always said, "It is nice to share."
So {he} went to {friend}. "I am sorry," said {name}. "Here, you can have half of them."
{friend} smiled. "Thank you, {name}!" | "Thank you! You are a good friend," said {friend}.
? They sat close together and ate the {treats}. | They ate until the {holder} was empty.
& They gave some to the {pet}, too.
{name} learned that it is good to share. | From that day on, {name} always shared with {friend}.""",
    "afraid of the dark": """
> {When}, {name} played outside until the sun went down. | {When}, {name} played with {his} {toy} until it got dark.
{His} {parent} read {him} a story and turned off the light. | {His} {parent} gave {him} a kiss and blew out the candle.
The room was very dark, and {name} was afraid. | {name} did not like the dark. {He} hid under the blanket.
Then {he} heard a strange sound. It went, "{Noise}!" | "{Noise}!" What was that? {name}'s heart beat very fast.
& The {pet} came close to keep {him} warm. | Even the {pet} was a little afraid.
> "Please come! I am scared!" called {name}. | {name} called out for {his} {parent}.
{His} {parent} came in with a small light. "What is wrong?" {p_he} asked.
"There is a monster in my room," said {name}. | "Something is out there in the dark," said {name}.
"Let's look together," said {his} {parent}. {P_he} held {name}'s hand. | "Let me see," said {his} {parent}.
They looked under the bed. No one was there. The sound was only {cause}! | Then it came again. It was only {cause}!
> {name} laughed. "That is not a monster at all," {he} said. | "How silly I was!" said {name}, and they both laughed.
Soon {name} was fast asleep. | {name} closed {his} eyes and slept well. | {name} was not afraid any more.""",
    "making a gift": """
> {When}, {name} heard that {his} {parent} had a birthday. | {When}, {name} thought of the birthday of {his} {parent}.
{name} wanted to give {p_him} something nice, but {he} had no money. | {name} wanted to find the best gift of all.
& {He} asked {his} {pet}, but the {pet} only looked at {him}.
Then {he} had an idea. "I can make {a_gift}!" {he} said. | "I know! I will make {a_gift}," said {name}.
> {He} found some {material} and went to work. | {name} got some {material} and sat down at the table.
? At first, it did not look right, so {he} tried again. | It was hard work, but {name} did not stop.
When it was done, {he} put it in a box with {a_color} ribbon. | After an hour, {he} put the {gift} in {a_color} box.
> {name} took it to {his} {parent}. "Happy birthday!" {he} said. | That evening, {name} gave the box to {his} {parent}.
{His} {parent} opened the box and saw the {gift}. | {His} {parent} opened it slowly. Inside was the {gift}.
"Did you make this for me?" {p_he} asked. "Yes, I made it all by myself," said {name}.
"It is the best gift in the world," said {his} {parent}. | {P_he} gave {name} a big hug. "I love it," {p_he} said.
{name} felt very proud. | {name} learned that a gift made with love is the best gift of all.""",
    "learning a skill": """
> {When}, {name} met {his} friend {friend}, who was {skilling}. | {When}, {name} saw {his} friend {friend} {skilling}.
"I want to {skill}, too," said {name}. | "That looks like fun! I wish I could {skill}," said {name}.
{He} tried, but {trouble}. | {He} tried it at once, but {trouble}.
"This is too hard for me," {he} said. | {name} sat down and began to cry. "I will never learn it," {he} said.
& The {pet} sat close to {him}.
> "Do not give up," said {friend}. "It was hard for me at first, too. I will help you."
So {friend} showed {him} how to do it, step by step. | {friend} went very slowly, and {name} watched with care.
Every day after lunch, they practiced together. | They practiced again the next day, and the day after that.
> After a week, {name} tried once more. This time, {he} {skilled} all by {self}!
? "Look! I can {skill}!" {he} shouted. | {name} was so happy that {he} laughed out loud.
{friend} clapped. "I knew that you could do it!" | "You did it! I am proud of you," said {friend}.
{name} learned that if you keep trying, you can do hard things. | Now they had fun together every day.""",
    "a hungry animal": """
> {When}, {name} took a walk near the {landmark}. | {When}, {name} walked to the {place}.
{He} had {a_food} in {his} bag. | {His} {parent} gave {him} {a_food} to eat on the way.
Then {name} saw a little {young} under a tree. | Soon, {he} heard a soft cry. It came from a little {young}.
? It was thin and cold. | It had sad eyes, and its tummy made a loud sound.
& The {pet} went up to it and said hello.
> "Are you hungry?" asked {name}. "Yes," said the {young}. "I have not eaten all day."
{name} broke the {food} in two and gave half to the {young}. | {name} was hungry, too, but {he} gave it the {food}.
"Thank you," it said. "You are very kind." | The {young} felt better. "That was so good!" it said.
> "Where is your mother?" asked {name}. "I cannot find her," said the {young}. So they went to look for her.
| "Where do you live?" asked {name}. "I live far away, and I am lost," said the {young}. So {name} took it home.
At last, they came to a big tree. The mother of the {young} ran out and kissed her baby.
{name} waved and went home with a warm heart. | After that, {name} and the {young} were good friends.""",
    "rain on a picnic": """
> {When}, {name} and {his} friend {friend} wanted to have a picnic at the {place}.
They packed {treats}, a big cake and {a_color} blanket. | {friend} brought a cake, and {name} brought some {treats}.
? "This will be the best picnic ever!" said {friend}. | They could not wait to eat.
& The {pet} came along, too. | The {pet} ran in front of them all the way.
> They had just sat down when a drop of water fell on {name}'s nose. | But soon, dark clouds covered the sky.
Then it rained very hard. | Then there was a loud boom, and the rain came down.
"Run!" said {name}. They took the food and ran as fast as they could. | They picked up the food and ran.
"Our picnic is spoiled!" cried {friend}. | Their feet were wet, and {friend} was sad. "No picnic today," {friend} said.
> But {name} had an idea. "We can have our picnic {shelter}," {he} said.
They ate and told funny stories. | They ate and sang a song about the rain. | They ate until they saw a rainbow.
"This was a good picnic after all," said {friend}. | "I like a picnic in the rain!" said {name}, and they both laughed.
{name} learned that a little rain cannot spoil a good day. | They had never had so much fun.""",
    "the truth about a broken thing": """
> {When}, {name} ran around in the house. "Do not run inside," said {his} {parent}.
| {When}, {name} played with a ball in the kitchen. "Please play outside," said {his} {parent}.
But {name} did not listen. | {name} heard it, but {he} was having too much fun to stop.
Then {he} bumped into the table. Crash! The {color} {fragile} fell down and broke.
& The {pet} hid under the bed.
> {name} tried to fix it, but {he} could not. {He} hid the pieces {spot}. | {name} was scared and hid the pieces {spot}.
Soon {his} {parent} came in. "Where is my {fragile}?" {p_he} asked.
"I do not know," said {name}. But {he} felt bad inside. | {name} wanted to say that {he} did not know. But it was a lie.
> Then {he} told the truth. "I broke it. I am so sorry," said {name}. | "It was me. I am sorry," {name} said softly.
? {His} {parent} was quiet for a moment. Then {p_he} hugged {him}. | {His} {parent} took {name}'s hand.
"I am sad about the {fragile}, but I am glad that you told me the truth," said {his} {parent}.
{name} felt much better. | {name} learned that it is always best to tell the truth.""",
    "a new friend": """
> {When}, {name} went to the {place}, but there was no one to play with. | {When}, {name} was all alone at the {place}.
Then {he} saw {a_stranger} under a big tree. | Near the gate, {he} saw {a_stranger} with sad eyes.
& The {pet} went first, and {name} went after it.
"Hello, my name is {name}," {he} said. "What is your name?"
"I am {friend}. I am new here, and I do not have any friends yet." | "My name is {friend}," came the soft answer.
> "I can be your friend," said {name}. "Do you want to play with my {toy}?"
| {name} took out {his} {toy}. "Would you like to play with me?" {he} asked.
{friend} nodded and smiled. | "Yes, please!" said {friend}. "I would love to play."
They played with the {toy} until they were tired. | They took turns with the {toy}. Then they made up a silly song.
> Then it got late. "Will you come back tomorrow?" asked {friend}. "Yes, I will," said {name}.
? The next day, they met at the {place} again. | {name} told {his} {parent} all about {friend}.
From that day on, {name} and {friend} were best friends. | {name} was glad that {he} had said hello.""",
    "a garden": """
> {When}, {name}'s {parent} gave {him} some seeds. | {When}, {name} found a bag of seeds in the kitchen.
"If you take care of them, they will turn into {plants}," said {his} {parent}.
{name} dug small holes in the garden and put the seeds inside. | {He} put the seeds in the ground and gave them water.
& The {pet} helped {him} dig. | The {pet} watched from the grass.
> The next morning, {name} ran to the garden, but there was nothing to see. | {name} waited, but nothing came up.
"Where are my {plants}?" {he} asked. "You must wait," said {his} {parent}. "Good things take time."
So {name} gave the seeds water every day. | So {name} waited. {He} pulled out the weeds and kept the birds away.
? One week it was very hot, so {he} gave them more water. | A snail wanted to eat there, so {name} carried it away.
> Then, one morning, {name} saw a tiny green leaf. "They are growing!" {he} shouted.
By the end of the summer, the garden was full of big {plants}. | The leaves grew. Soon there were many {plants}.
{name} and {his} {parent} made a big pot of soup. | {name} filled a basket and took some to {his} friend {friend}.
{name} learned that it is good to wait. | "These are the best {plants} in the world!" said {name}.""",
    "a race": """
> {When}, there was a big race at the {place}, and {name} wanted to win. | {When}, {name} ran in a race at the {place}.
"I will be first," said {his} friend {friend}. | {name}'s friend {friend} wanted to win, too.
An old {seller} called, "Ready, set, go!" | "One, two, three, go!" said an old {seller}.
& The {pet} ran next to {name}.
> At first, {friend} was in front, but then {friend} fell. | They ran side by side. Then {friend} tripped and fell.
Now {name} could win! But then {he} heard {friend} cry. | {name} looked at the end of the race. It was so close.
{name} stopped and went back. "Are you hurt?" {he} asked. | {name} ran back to help. "What is wrong?" {he} asked.
"My foot hurts," said {friend}. "I cannot run any more." | "It is my knee," said {friend}.
> "Hold on to me," said {name}. They walked to the end together. | {name} helped {friend} up, and they walked on.
? Someone else won the race, but no one was sad. | They were the last, but everyone clapped.
"You have the biggest hearts," said the old {seller}. | The old {seller} gave each of them a golden cup.
{friend} hugged {name}. "Thank you," {friend} said. | {name} learned that a friend is better than a prize.""",
    "stuck": """
> {When}, {name} heard a cry near the {landmark}. | {When}, {name} was on the way to the {place}. Then {he} heard a cry.
A little {young} was stuck {trap}. | {He} looked around and saw a little {young}. It was stuck {trap}.
? "Help! I cannot get out!" it cried. | "I will help you," said {name}. | "Do not be afraid," said {name}.
{He} pulled and pulled, but the {young} did not move. | {He} tried very hard, but {he} was not strong enough.
& The {pet} pulled, too, but it did not help.
> So {name} ran to get {his} friend {friend}. | "Wait here," said {name}, and {he} ran to get {his} friend {friend}.
{friend} brought a long rope. "We can do it if we work together," said {friend}.
"One, two, three, pull!" they shouted. Pop! The {young} was free. | They pulled as hard as they could. Then it was free!
? They all fell down in the grass and laughed. | They were dirty and tired, but they were happy.
> The {young} jumped for joy. "Thank you, thank you!" it said. | "You saved me!" said the {young}. "You are so kind!"
? It showed them where the sweet berries grew. | {name} gave it {a_food}, and it ate every bite.
From then on, they were all good friends. | They learned that work is easy when friends help.""",
    "lost in the market": """
> {When}, {name} went to the market with {his} {parent}. | {When}, {name}'s {parent} took {him} to the market.
? "Stay close to me," said {his} {parent}. | They saw baskets of fruit and smelled warm bread.
But {name} saw a funny man with {a_color} {toy2} and stopped to look. | Then {name} stopped to look at {a_color} {toy2}.
When {he} turned around, {his} {parent} was gone. | After a moment, {he} looked up. {His} {parent} was not there!
> "Where are you?" called {name}. No one answered. | {name} looked left and right, but {he} saw only strangers.
& Only the {pet} was still with {him}.
A kind {seller} saw {him}. "Are you lost?" asked the {seller}. | {name} began to cry. A kind {seller} saw {him}.
"I cannot find my {parent}," said {name}. "{P_he} has {a_color2} {garment} and a big smile."
? The {seller} took {name}'s hand, and they walked around the market.
> Soon {name} saw {a_color2} {garment}. | At last, {he} saw the {color2} {garment}. "There!" {he} shouted.
{His} {parent} ran to {him} and held {him} tight. "I was so worried," {p_he} said.
They thanked the {seller} and went home. | {name} was so happy. "I will always stay close now," {he} said.""",
}
CLOSINGS = ("",) * 10 + (" The end.", " And they all lived happily ever after.")


def with_article(phrase: str) -> str:
    """Put "a" or "an" before a phrase, by the sound of its first word rather than by its first letter."""
    vowel = phrase[0] in "aeiou" and not phrase.startswith(("uni", "use", "one"))
    return ("an " if vowel or phrase.startswith(("honest", "hour")) else "a ") + phrase


def _parse(text: str) -> list[tuple[str, list[str]]]:
    """Turn an opening or a plot into its beats: the mark, and the phrasings with the white space that goes before."""
    beats: list[tuple[str, list[str]]] = []
    for line in text.strip().replace("\n|", " |").splitlines():
        mark = line[0] if line[0] in ">?&" else ""
        space = "\n" if mark == ">" else " "
        beats.append((mark, [space + phrasing.strip() for phrasing in line[len(mark):].split(" | ")]))
    return beats


_WORDS = [[tuple({slot + twin: word for slot, word in zip(slots.split(":"), row.split(":"), strict=True)}
                 for twin in ("", "2")) for row in rows.split(",")] for slots, rows in WORDS.items()]
_OPENINGS = [(with_pet, days, _parse(text)) for parts, with_pet, days, text in OPENINGS for _ in range(parts)]
_PLOTS = [_parse(text) for text in PLOTS.values()]


def _cast(pick: Callable, with_pet: bool) -> dict[str, str]:
    """Choose whom and what a story is about: the words for all slots, the same from its first sentence to its last."""
    cast = {}
    for rows in _WORDS:
        words, others = pick(rows), pick(rows)
        while others is words:
            others = pick(rows)
        cast |= words[0] | others[1]  # two of everything: {color} and {color2} differ
    hero, friend = pick(("girl", "boy")), pick(("girl", "boy"))
    cast |= {"name": cast[hero], "friend": cast[friend + "2"]}
    he, him, his = ("she", "her", "her") if hero == "girl" else ("he", "him", "his")
    cast |= {"he": he, "him": him, "his": his, "self": him + "self"}
    if not with_pet and pick((True, False, False)):  # who has a pet is a child
        hero, friend = pick((cast["wild"], cast["pet"])), cast["wild2"]
    cast |= {"hero": f"{cast['trait']} {hero}", "stranger": friend}
    counted = ("hero", "stranger", "home", "color", "color2", "food", "gift")
    cast |= {f"a_{slot}": with_article(cast[slot]) for slot in counted}
    return cast | {slot.capitalize(): cast[slot].capitalize() for slot in ("he", "his", "p_he", "noise")}


def make_story(seed: int, index: int) -> str:
    """Write story number index of a seed: 2 to 5 paragraphs, a line each, the same on every machine and Python."""
    # random() alone: the one method whose numbers Python promises to keep from version to version.
    roll = random.Random(f"{seed} {index}").random

    def pick(options):
        return options[int(roll() * len(options))]

    with_pet, days, opening = pick(_OPENINGS)
    chance = {"?": 0.5, "&": float(with_pet)}
    told = [pick(phrasings) for mark, phrasings in opening + pick(_PLOTS) if roll() < chance.get(mark, 1.0)]
    return ("".join(told) + pick(CLOSINGS)).lstrip().format_map(_cast(pick, with_pet) | {"When": pick(days)})


def sample_stories(seed: int, start: int = 0) -> Iterator[str]:
    """Yield the stories of a seed without end, from number start on; each depends on the seed and its number alone."""
    return (make_story(seed, index) for index in itertools.count(start))
