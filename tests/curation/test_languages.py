"""The languages of short texts: one sentence is enough, and what does not show is not guessed."""

import pytest

from conftest import REPOSITORY
from forgebook.curation.languages import language_of
from support_planted import read

SENTENCES = {
    "English": """\
Can you replace my broken kettle before Friday please?
I bought a lamp last week and now it does not work.
Where should I send the parcel so that you can look at it?
My order never came, please give me my money back.
Write a short poem about autumn leaves falling in the rain.
Explain photosynthesis to a child in two sentences.
She told him they would meet again at noon.""",
    "German": """\
Können Sie bitte meinen kaputten Wasserkocher bis Freitag ersetzen?
Ich habe letzte Woche eine Lampe gekauft, jetzt geht sie nicht mehr.
Wohin soll ich das Paket schicken, damit Sie es ansehen können?
Schreibe ein kurzes Gedicht über fallende Blätter im Regen.
Erkläre einem Kind in zwei Sätzen, was Photosynthese ist.
Meine Bestellung ist nie angekommen, bitte geben Sie mir mein Geld zurück.""",
    "French": """\
Pouvez-vous remplacer ma bouilloire cassée avant vendredi, s'il vous plaît ?
J'ai acheté une lampe la semaine dernière et elle ne marche plus.
Où dois-je envoyer le colis pour que vous puissiez le regarder ?
Écris un court poème sur les feuilles qui tombent sous la pluie.
Explique la photosynthèse à un enfant en deux phrases.
Ma commande n'est jamais arrivée, rendez-moi mon argent.""",
    "Spanish": """\
¿Puede usted cambiar mi hervidor roto antes del viernes, por favor?
Compré una lámpara la semana pasada y ahora no funciona.
¿Adónde debo enviar el paquete para que ustedes lo revisen?
Escribe un poema corto sobre las hojas que caen en la lluvia.
Explica la fotosíntesis a un niño en dos frases.""",
    "Italian": """\
Potete sostituire il mio bollitore rotto entro venerdì, per favore?
Ho comprato una lampada la settimana scorsa e adesso non funziona.
Dove devo spedire il pacco perché voi possiate guardarlo?
Scrivi una breve poesia sulle foglie che cadono sotto la pioggia.
Spiega la fotosintesi a un bambino in due frasi.
Il mio ordine non è mai arrivato, ridatemi i soldi.""",
    "Portuguese": """\
Vocês podem trocar a minha chaleira quebrada até sexta-feira, por favor?
Comprei uma lâmpada na semana passada e agora ela não funciona.
Para onde devo enviar o pacote para que vocês possam ver?
Escreva um poema curto sobre as folhas que caem na chuva.
Explique a fotossíntese para uma criança em duas frases.
O meu pedido nunca chegou, devolvam o meu dinheiro.""",
    "Dutch": """\
Kunnen jullie mijn kapotte waterkoker voor vrijdag vervangen, alstublieft?
Ik heb vorige week een lamp gekocht en nu doet hij het niet meer.
Waar moet ik het pakket naartoe sturen zodat u het kunt bekijken?
Schrijf een kort gedicht over vallende bladeren in de regen.
Leg in twee zinnen aan een kind uit wat fotosynthese is.
Mijn bestelling is nooit aangekomen, geef me mijn geld terug.""",
}
CASES = [(language, text) for language, texts in SENTENCES.items() for text in texts.splitlines()]


@pytest.mark.parametrize(("language", "text"), CASES)
def test_the_language_of_a_sentence(language, text):
    assert language_of(text) == ("Latin", language)


@pytest.mark.parametrize(
    ("script", "text"),
    [("Cyrillic", "Где моя посылка и мои деньги?"),
     ("Japanese", "私の荷物はどこにありますか。"),
     ("Korean", "제 소포는 지금 어디에 있습니까? 알려 주세요."),
     ("Arabic", "أين طردي الذي طلبته؟"), ("Greek", "Πού είναι το δέμα μου;")],
)  # fmt: skip
def test_a_script_of_its_own(script, text):
    assert language_of(text) == (script, None)


@pytest.mark.parametrize(
    "text", ["", "42", "Ok", "def f(x): return x + 1", "Ada Byron, London, 12345", "print(lamp) kettle drum"]
)
def test_what_does_not_show(text):
    assert language_of(text)[1] is None


def test_english_messages_are_in_no_other_language():
    texts = [message["content"] for row in read("train.jsonl") for message in row["messages"][:2]]
    found = [language_of(text)[1] for text in texts]
    assert found.count("English") > 0.95 * len(texts) and set(found) <= {"English", None}
    messages = (REPOSITORY / "tests/real/sms_spam.tsv").read_text().splitlines()
    others = [text for text in messages if language_of(text.split("\t")[-1])[1] not in ("English", None)]
    assert len(others) <= 2  # "Ok then u tell me wat time u coming later lor."
