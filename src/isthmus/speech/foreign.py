"""Short texts of our own in languages other than English: digits as words, and commands.

A text is lower case words and single spaces, and a pure function of the Generator that draws it.
"""
# ruff: noqa: SIM905  # lists of words are easier to read and edit as text

import numpy as np

from isthmus.errors import IsthmusError, suggest

DIGITS = {
    "de": "null eins zwei drei vier fünf sechs sieben acht neun".split(),
    "es": "cero uno dos tres cuatro cinco seis siete ocho nueve".split(),
    "fr": "zéro un deux trois quatre cinq six sept huit neuf".split(),
    "it": "zero uno due tre quattro cinque sei sette otto nove".split(),
    "nl": "nul een twee drie vier vijf zes zeven acht negen".split(),
    "pl": "zero jeden dwa trzy cztery pięć sześć siedem osiem dziewięć".split(),
    "pt": "zero um dois três quatro cinco seis sete oito nove".split(),
}
COMMANDS = {
    "de": """ja nein an aus auf ab links rechts vorwärts zurück halt los licht tür fenster musik
        lauter leiser heute morgen danke bitte""".split(),
    "es": """sí no enciende apaga arriba abajo izquierda derecha adelante atrás para empieza luz
        puerta ventana música fuerte despacio hoy mañana gracias otra""".split(),
    "fr": """oui non allume éteins monte descends gauche droite avance recule arrête commence
        lumière porte fenêtre musique fort doucement maintenant demain merci encore""".split(),
    "it": """sì no accendi spegni su giù sinistra destra avanti indietro ferma comincia luce porta
        finestra musica forte piano oggi domani grazie ancora""".split(),
    "nl": """ja nee aan uit omhoog omlaag links rechts vooruit terug stop start licht deur raam
        muziek harder zachter vandaag morgen bedankt alsjeblieft""".split(),
    "pl": """tak nie włącz wyłącz góra dół lewo prawo naprzód wstecz stój zacznij światło drzwi
        okno muzyka głośniej ciszej dzisiaj jutro dziękuję proszę""".split(),
    "pt": """sim não acende apaga cima baixo esquerda direita frente atrás para começa luz porta
        janela música alto devagar hoje amanhã obrigado outra""".split(),
}
VOICES = {  # espeak-ng's, of the countries that it knows
    "de": ("de",),
    "es": ("es", "es-419"),
    "fr": ("fr-fr", "fr-be", "fr-ch"),
    "it": ("it",),
    "nl": ("nl",),
    "pl": ("pl",),
    "pt": ("pt", "pt-br"),
}
ENGLISH = "en"
LANGUAGES = (ENGLISH, *DIGITS)


def check_language(language: str) -> None:
    """Raise IsthmusError for a language that is not spoken here."""
    if language not in LANGUAGES:
        raise IsthmusError(
            f"No speech is made in the language {language!r}.{suggest(language, LANGUAGES)} Known: "
            f"{', '.join(LANGUAGES)}."
        )


def short_text(rng: np.random.Generator, language: str) -> str:
    """Digits, commands, or a command with digits, in a language other than English."""
    digits, commands = DIGITS[language], COMMANDS[language]
    kind = rng.random()
    words = []
    if kind >= 0.4:
        words += [commands[i] for i in rng.integers(len(commands), size=rng.integers(1, 3))]
    if kind < 0.4 or kind >= 0.75:
        words += [digits[i] for i in rng.integers(len(digits), size=rng.integers(1, 6))]
    return " ".join(words)
