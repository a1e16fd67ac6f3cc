"""Word lists of the synthetic text: plain English, lower case, written for this package."""
# ruff: noqa: SIM905  # long lists of words are easier to read and edit as text

from collections.abc import Iterable
from typing import NamedTuple

UNITS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen""".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
DIGITS = UNITS[:10]
ORDINALS = """first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth
    thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth
    """.split()
MONTHS = """january february march april may june july august september october november
    december""".split()
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
LETTERS = list("abcdefghijklmnopqrstuvwxyz")

COMMANDS = """yes no up down left right on off stop go bed bird cat dog happy house marvin sheila
    tree wow backward forward follow learn visual zero one two three four five six seven eight
    nine next previous start cancel close open play pause resume enter exit undo redo copy paste
    delete save send record mute volume louder softer zoom rotate move select help menu home
    back scroll answer call reject ok options disable enable digit direction receive ask
    """.split()
KEYWORDS = ["alexa", "computer", "jarvis", "smart mirror", "snowboy", "view glass"]

DRINKS = """americano cappuccino coffee espresso latte mocha drip_coffee house_coffee iced_coffee
    iced_mocha""".split()
MILKS = "milk cream soy_milk whole_milk skim_milk almond_milk".split()
SWEETENERS = "sugar brown_sugar sweetener".split()
CARD_RANKS = "ace two three four five six seven eight nine ten jack queen king".split()
CARD_SUITS = "clubs diamonds hearts spades".split()

NAMES = """adam agnes alan albert alice amy andrew ann anna arthur barbara ben bernard betty bill
    bob carl carol caroline charles charlotte clara daniel david diana dora dorothy edith edward
    eleanor elizabeth ellen emily emma eric ernest eva frances frank fred george grace hannah
    harold harry helen henry hugh ida irene jack jacob james jane janet jean jim joan joe john
    joseph julia karen kate laura lewis linda lucy margaret maria mark martha martin mary
    matthew michael nancy nathan oliver oscar patrick paul peter philip rachel ralph rebecca
    richard robert rose ruth sam samuel sarah simon sophie stephen susan theodore thomas tom
    victor vincent walter william""".split()
PLACES = """america africa asia boston canada chicago china england europe france germany india
    ireland italy japan london mexico paris rome russia scotland spain texas""".split()

# A slash parts a word from its irregular form or forms.
PEOPLE = """actor artist aunt baby baker banker boy brother builder captain child/children clerk
    cook cousin dancer daughter dealer doctor driver engineer farmer father fellow
    fisherman/fishermen friend gentleman/gentlemen girl guard guest guide hunter husband judge
    king lady landlord lawyer leader maid man/men manager master merchant miner minister mother
    neighbor nephew nurse officer owner painter passenger pilot player poet policeman/policemen
    president priest prince prisoner professor pupil queen reader ruler sailor scientist
    secretary servant sheriff singer sister soldier son stranger student tailor teacher traveler
    uncle visitor waiter wife/wives winner woman/women worker writer""".split()
ANIMALS = """bear bee bird bull camel cat chicken cow crow deer/deer dog donkey duck eagle elephant
    fish/fish fly fox frog goat goose/geese hawk hen horse insect lamb lion mouse/mice monkey
    owl ox/oxen pig pigeon pony puppy rabbit rat sheep/sheep snake spider swan tiger turtle
    whale wolf/wolves worm""".split()
THINGS = """account address airplane answer apple arm arrow axe bag ball banana band bank barn
    barrel basket bath battle beach bean bed bell belt bench berry bike bill blanket board boat
    body bone book boot bottle bowl box branch bridge brush bucket building bus bush button
    cabin cage cake camera camp candle cap car card carpet carriage cart case castle ceiling
    chain chair chance cheese cherry chest chimney church circle city clock cloth cloud coat
    coin college color comb copy corner cottage country court cradle crowd crown cup curtain
    cushion danger day deck desk dinner dish ditch dollar door dream dress drop drum ear edge
    egg engine envelope evening event eye face factory family farm feather feast fence field
    finger fire flag flame floor flower foot/feet forest fork fountain game garden gate gift
    glass glove grave group gun hall hammer hand handle harbor hat head heart hill hole holiday
    home hook hospital hotel hour house idea inn iron island jacket jar jewel job journey joke
    key kitchen kite knife/knives knot ladder lake lamp land lane law lawn leaf/leaves leg lemon
    lesson letter library light line lip list loaf/loaves lock log machine magazine map market
    mark mat match meadow meal medal meeting message mile mill mind minute mirror mistake moment
    month mountain mouth movie museum nail name napkin neck necklace needle nest net night nose
    note number nut oak ocean office onion orange order oven page pair palace pan paper parcel
    park party path pear pen pencil penny phone photograph piano picture pie piece pillow pin
    pipe pit plan planet plate pocket poem point pole pool porch port post pot potato/potatoes
    present price prison prize problem promise purse puzzle question race radio railway ray
    report restaurant reward ribbon rifle ring river road robe rock roof room rope rose route
    row rule sack saddle sail sandwich school screen sea seat secret seed sentence shadow shape
    shed sheet shelf/shelves shell ship shirt shoe shop shore shoulder sign skirt song sound
    spoon spot spring square stable stage stair stamp star station statue step stick stocking
    stone stool store storm story stove stream street string suit summer supper surprise sweater
    sword table tail tale tank task tear telephone tent test thing thought throat thumb ticket
    tie tire toe tomato/tomatoes tongue tool tooth/teeth towel tower town toy track train trap
    tray treasure tree trip truck trunk tube tunnel umbrella uniform valley vase vessel village
    violin visit voice wagon wall war watch wave wedding week well wheel whip whistle window
    wing winter wire wish wood word world yard year""".split()
STUFF = """advice air anger art beauty blood bread business butter chalk cloth coal cold comfort
    corn courage cotton cream dust earth education energy evidence faith fame fear flour food
    freedom fruit fun furniture gold grass grief ground hair happiness hay health heat history
    honey honor hope hunger ice ink joy juice justice kindness knowledge leather love luck meat
    medicine milk money mud music nature news oil paint patience peace pepper pleasure power
    pride rain rice salt sand science sense silence silk silver sleep smoke snow soap soup steam
    steel strength sugar sunlight tea time traffic trouble trust truth water weather wheat wind
    wine wisdom wool work""".split()
ADJECTIVES = """able absent afraid ancient angry asleep awake bad bare beautiful bent better big
    bitter black blind blue bold brave bright broad broken brown busy calm careful careless
    cheap cheerful clean clear clever cold common cool correct crazy cruel curious damp
    dangerous dark dead deaf dear deep delicious different difficult dirty distant double dry
    dull eager early easy empty equal evil exact excellent fair faint false famous fat favorite
    fine firm flat foolish foreign free fresh friendly full funny future gentle glad golden good
    grand grateful gray great green guilty handsome happy hard healthy heavy high hollow holy
    honest hot huge humble hungry ill important innocent jealous jolly keen kind lame large last
    late lazy lean light little lonely long loose lost loud lovely low lucky mad mean merry
    mighty mild modern narrow near neat nervous new nice noble noisy odd old open ordinary pale
    patient perfect plain pleasant polite poor possible precious pretty private proud public
    pure quick quiet rapid rare raw ready real red rich ripe rotten rough round royal rude
    sacred sad safe secret serious severe shallow sharp short shy sick silent silly simple
    single sleepy slender slight slow small smart smooth soft solid sore sour special splendid
    steady steep stiff still straight strange strict strong stupid sudden sweet swift tall tame
    tender terrible thick thin thirsty tidy tight tiny tired true ugly useful useless usual vain
    warm weak wealthy weary wet white whole wicked wide wild willing wise wonderful wooden worse
    worthy wrong yellow young""".split()
ADVERBS = """again alone already always badly bravely carefully certainly clearly closely easily
    finally freely gently gladly happily hardly loudly nearly never often once perhaps plainly
    politely probably quickly quietly rarely really seldom silently simply slowly softly
    sometimes soon suddenly surely sweetly swiftly together twice usually""".split()
TIMES = """today tonight yesterday tomorrow now then at_last at_once last_night this_morning
    this_evening next_week last_year every_day all_day before_breakfast after_dinner at_midnight
    at_noon in_the_morning in_the_evening for_an_hour in_a_moment long_ago""".split()
PREPOSITIONS = """about above across after against along among around before behind below beneath
    beside between beyond by down for from in inside into like near of off on over past round
    through to toward under up upon with within without""".split()
EXCLAMATIONS = "oh well yes no please indeed ah now so hello".split()

# base, and past with participle where irregular
TRANSITIVE = """accept admire answer ask attack beat/beat/beaten bite/bit/bitten blame borrow
    break/broke/broken bring/brought build/built burn bury buy/bought call carry catch/caught
    cause change choose/chose/chosen clean climb close collect compare control cook copy count
    cover cross cut/cut deliver describe destroy discover divide draw/drew/drawn
    drink/drank/drunk drive/drove/driven drop eat/ate/eaten enjoy examine expect explain
    feed/fed fear feel/felt fight/fought fill find/found finish fix fold follow
    forget/forgot/forgotten forgive/forgave/forgiven gather give/gave/given greet guard guess
    guide hate hear/heard help hide/hid/hidden hire hit/hit hold/held hurt/hurt imagine invite
    join judge keep/kept kick kill kiss know/knew/known lead/led learn leave/left lend/lent lift
    light/lit like lock lose/lost love make/made mark marry measure meet/met mend miss move need
    notice obey offer open order own paint pass pay/paid pick plant please praise prepare press
    promise protect prove pull punish push raise reach read/read receive remember remove repair
    repeat respect ride/rode/ridden ring/rang/rung rob roll rub rule save see/saw/seen
    seek/sought sell/sold send/sent serve shake/shook/shaken share shoot/shot show/showed/shown
    shut/shut sing/sang/sung smell spare spell spend/spent spread/spread steal/stole/stolen
    strike/struck study supply support suspect sweep/swept take/took/taken taste teach/taught
    tear/tore/torn tell/told thank think_of/thought_of threaten throw/threw/thrown tie touch
    train trust turn understand/understood use visit wake/woke/woken want warn wash waste watch
    wear/wore/worn weigh win/won wipe wish_for worry wrap write/wrote/written""".split()
INTRANSITIVE = """agree appear arrive become_tired/became_tired/become_tired bow breathe complain
    continue cough cry dance depart die disappear dream fade fail fall/fell/fallen
    fly/flew/flown freeze/froze/frozen gaze glow go/went/gone grow/grew/grown hesitate hurry
    jump kneel/knelt knock laugh lie/lay/lain listen live look march nod pause play pray rest
    return rise/rose/risen roar run/ran/run sail shine/shone shout sigh sink/sank/sunk sit/sat
    sleep/slept slip smile sneeze speak/spoke/spoken stand/stood stare start stay step struggle
    succeed suffer swim/swam/swum talk travel tremble wait walk wander weep/wept whisper wonder
    work yawn""".split()
SAYING = """say/said think/thought believe know/knew/known hope feel/felt declare hear/heard
    remember""".split()
DOUBLED = frozenset("control forget".split())  # double the last letter despite two syllables


class Noun(NamedTuple):
    """A countable noun."""

    singular: str
    plural: str


class Verb(NamedTuple):
    """The five forms of a verb."""

    base: str
    third: str  # he walks
    past: str
    participle: str  # he has walked
    gerund: str  # walking


def noun(entry: str) -> Noun:
    """Read `child/children`, or derive the regular plural."""
    singular, _, plural = entry.replace("_", " ").partition("/")
    return Noun(singular, plural or with_s(singular))


def verb(entry: str) -> Verb:
    """Read `write/wrote/written` or `sit/sat`, or derive the regular forms; `_` adds a particle."""
    forms = entry.split("/")
    base, _, particle = forms[0].partition("_")
    irregular = [form.partition("_")[0] for form in forms[1:]]
    past = irregular[0] if irregular else _with_ending(base, "ed")
    participle = irregular[-1] if irregular else past
    words = (base, with_s(base), past, participle, _with_ending(base, "ing"))
    return Verb(*(f"{word} {particle}".rstrip() for word in words))


def with_s(word: str) -> str:
    """Return the plural of a noun, or the third person of a verb."""
    if word.endswith(("s", "x", "z", "ch", "sh")) or word == "go":
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


def _with_ending(base: str, ending: str) -> str:
    """Add -ed or -ing with the usual changes of spelling."""
    if ending == "ing" and base.endswith("ie"):
        return base[:-2] + "ying"
    if base.endswith("e") and (ending == "ed" or not base.endswith("ee")):
        return base[:-1] + ending
    if ending == "ed" and base.endswith("y") and base[-2] not in "aeiou":
        return base[:-1] + "ied"
    vowels = [letter in "aeiou" for letter in f"  {base}"[-3:]]
    closed = vowels == [False, True, False] and base[-1] not in "wxy"
    if closed and (sum(letter in "aeiou" for letter in base) == 1 or base in DOUBLED):
        return base + base[-1] + ending
    return base + ending


def words_of(texts: Iterable[str]) -> set[str]:
    """Return the single words of some texts."""
    return {word for text in texts for word in text.replace("_", " ").split()}
