"""Questions that a small pretrained model may know the answers of, and wrong answers: what a critic is tried on.

The wrong answer to a question is the right one of another question, at some distance: well written, and beside the
point.
"""

FACTS = """\
What is the capital of France?|The capital of France is Paris.
What do bees make?|Bees make honey from the nectar of flowers.
How many days are in a week?|There are seven days in a week.
Who wrote Romeo and Juliet?|William Shakespeare wrote Romeo and Juliet.
What is the largest planet of the solar system?|Jupiter is the largest planet of the solar system.
At what temperature does water freeze?|Water freezes at 0 degrees Celsius.
What gas do plants take in?|Plants take in carbon dioxide from the air.
Which animal is called the king of the jungle?|The lion is called the king of the jungle.
What language is spoken in Brazil?|Portuguese is spoken in Brazil.
What is the opposite of hot?|The opposite of hot is cold.
How many legs does a spider have?|A spider has eight legs.
What is a baby dog called?|A baby dog is called a puppy.
Which ocean lies between Europe and America?|The Atlantic Ocean lies between Europe and America.
What is used to cut paper?|Scissors are used to cut paper.
What color is the sky on a clear day?|The sky is blue on a clear day.
Who was the first man on the moon?|Neil Armstrong was the first man on the moon.
What is the currency of Japan?|The currency of Japan is the yen.
Which organ pumps blood through the body?|The heart pumps blood through the body.
What is the tallest mountain on Earth?|Mount Everest is the tallest mountain on Earth.
How many minutes are in an hour?|There are sixty minutes in an hour.
What do cows eat?|Cows eat grass and hay.
Which instrument has black and white keys?|The piano has black and white keys.
What is the capital of Italy?|The capital of Italy is Rome.
What metal are coins often made of?|Coins are often made of copper and nickel.
Which season comes after winter?|Spring comes after winter.
What is the square root of 81?|The square root of 81 is 9.
Who painted the Mona Lisa?|Leonardo da Vinci painted the Mona Lisa.
What do you call frozen water?|Frozen water is called ice.
Which planet is closest to the sun?|Mercury is the planet closest to the sun.
What tool drives nails into wood?|A hammer drives nails into wood.
Which bird cannot fly but swims well?|The penguin cannot fly but swims well.
What is the main ingredient of bread?|The main ingredient of bread is flour.
Which country has the pyramids of Giza?|The pyramids of Giza are in Egypt.
What do we breathe with?|We breathe with our lungs.
How many wheels does a bicycle have?|A bicycle has two wheels.
Which vitamin does sunlight give us?|Sunlight helps the body to make vitamin D.
What is the capital of Germany?|The capital of Germany is Berlin.
Who discovered gravity when an apple fell?|Isaac Newton is said to have discovered gravity when an apple fell.
What is the largest ocean?|The Pacific Ocean is the largest ocean.
Which sport uses a racket and a net?|Tennis uses a racket and a net.
What do caterpillars turn into?|Caterpillars turn into butterflies.
What is the boiling point of water?|Water boils at 100 degrees Celsius.
Which month has 28 days in most years?|February has 28 days in most years.
What is the fastest land animal?|The cheetah is the fastest land animal.
What do doctors use to listen to the heart?|Doctors use a stethoscope to listen to the heart.
Which fruit is yellow and curved?|The banana is yellow and curved.
What is the capital of Spain?|The capital of Spain is Madrid.
What shape has three sides?|A triangle has three sides.
Which insect spins no web but makes silk?|The silkworm makes silk.
What device tells the time?|A clock tells the time.""".splitlines()
DISTANCE = 7
# What the critic sees before each question.
SHOTS = [
    {"question": "What is the capital of England?", "answer": "The capital of England is London.", "score": 5},
    {"question": "How many months are in a year?", "answer": "A guitar has six strings.", "score": 1},
    {"question": "What animal gives us wool?", "answer": "Milk is white.", "score": 1},
    {"question": "What animal gives us wool?", "answer": "Sheep give us wool.", "score": 5},
]


def graded(start: int = 0, stop: int | None = None) -> list[dict]:
    """Return for each question an example with its right answer and one with a wrong one, as `good` says."""
    pairs = [fact.split("|") for fact in FACTS]
    rows = []
    for k in range(*slice(start, stop).indices(len(pairs))):
        for answer, good in ((pairs[k][1], True), (pairs[(k + DISTANCE) % len(pairs)][1], False)):
            messages = [{"role": "user", "content": pairs[k][0]}, {"role": "assistant", "content": answer}]
            rows.append({"messages": messages, "good": good})
    return rows
