"""Seed prompts of our own for self-distillation: task templates filled from word lists, drawn by a seeded generator.

They cover what a small chat model is asked to do (questions, explanations, writing, code, translation, arithmetic) and
share no sentence with the evaluation prompts that ship with the package.
"""

import numpy as np

_TOPICS = """the water cycle|photosynthesis|gravity|black holes|volcanoes|earthquakes|the moon|solar power|wind energy|electric cars
vaccines|the human heart|sleep|healthy eating|running|yoga|meditation|stress|memory|learning a language|reading books|chess
football|swimming|cooking pasta|baking bread|coffee|tea|chocolate|gardening|bees|dogs|cats|whales|elephants|dinosaurs|rainforests
deserts|rivers|oceans|climate change|recycling|plastic waste|the Roman Empire|ancient Egypt|the Renaissance|the Industrial Revolution
the printing press|the internet|smartphones|social media|artificial intelligence|robots|computer programming|databases|encryption
money|saving for retirement|inflation|banks|starting a small business|job interviews|teamwork|leadership|public speaking|time management
friendship|travel to Japan|Paris|New York|mountain hiking|camping|photography|painting|classical music|jazz|guitars|movies|poetry
fairy tales|democracy|human rights|schools|teachers|homework|mathematics|geometry|fractions|prime numbers|statistics|airplanes|trains
bicycles|bridges|skyscrapers|clocks|maps|the stars|Mars|satellites|weather forecasts|snow|thunderstorms|honey|bread|soup|salads""".replace(
    "\n", "|"
).split("|")

_ASK = """What is {t}?|Explain {t} to a child.|Explain {t} in simple terms.|Why is {t} important?|Give me five facts about {t}.
Write a short paragraph about {t}.|Write a short story about {t}.|Write a poem about {t}.|What are the benefits of {t}?
What are the main challenges of {t}?|How has {t} changed over time?|Give me three tips about {t}.|List some common myths about {t}.
Describe {t} in detail.|Write an email to a friend about {t}.|What should a beginner know about {t}?|Compare {t} and {u}.
How are {t} and {u} related?|Write a dialogue between two people about {t}.|Summarise the most important ideas about {t}.
Create a quiz with three questions about {t}.|What questions do people often ask about {t}?|Write an introduction for an essay on {t}.""".replace(
    "\n", "|"
).split("|")

_CODE = """returns the sum of a list of numbers|reverses a string|checks whether a word is a palindrome|counts the vowels in a string
returns the largest number in a list|computes the factorial of n|returns the first n Fibonacci numbers|checks whether a number is prime
removes duplicates from a list|sorts a list of numbers|merges two dictionaries|counts how often each word occurs|reads a file line by line
converts Celsius to Fahrenheit|computes the average of a list|finds the second largest number|flattens a nested list|rotates a list by k
checks whether two words are anagrams|returns the common elements of two lists|computes the greatest common divisor|prints a multiplication table
converts a number to binary|capitalises every word|validates an email address|generates a random password|implements a stack
implements binary search|implements bubble sort|computes the area of a circle|splits a list into chunks|transposes a matrix""".replace(
    "\n", "|"
).split("|")

_SENTENCES = """Good morning, my friend.|Where is the train station?|I would like a cup of coffee, please.|The weather is beautiful today.
My sister lives in a small town.|We are going to the beach tomorrow.|How much does this book cost?|I lost my keys yesterday.
She is reading a newspaper in the garden.|The children are playing in the park.|Can you help me with my homework?|It is raining again.
I have been learning for two years.|The restaurant closes at ten.|He works in a hospital.|Thank you for your help.|The cat sleeps on the sofa.
They bought a new house last year.|What time does the film start?|My favourite colour is blue.|The soup is too hot.|We need more time.""".replace(
    "\n", "|"
).split("|")

_SUMS = """{n} has {a} apples and buys {b} more. How many apples does {n} have now?|A shop sells pens for {c} dollars each. How much do {a} pens cost?
{n} reads {a} pages a day. How many pages does {n} read in {c} days?|What is {a} plus {b}?|What is {a} times {c}?
There are {b} children and {a} leave. How many are left?|A train travels {b} miles in {c} hours. What is its average speed?
{n} earns {a} dollars an hour and works {c} hours. How much does {n} earn?|Solve for x: x + {a} = {b}.|What is {c} percent of {b}?
A rectangle is {a} metres long and {c} metres wide. What is its area?|Share {b} sweets among {c} friends. How many does each get?""".replace(
    "\n", "|"
).split("|")

_NAMES = "Anna Ben Carla David Emma Felix Grace Henry Ines Jack Kate Liam Mia Noah Olga Paul".split()
_LANGUAGES = "French Spanish German Italian Portuguese".split()


def seed_prompts(count: int, seed: int) -> list[str]:
    """`count` user messages: about half questions and writing, a sixth each of code, translation and arithmetic."""
    rng = np.random.default_rng(seed)

    def pick(items: list[str]) -> str:
        return items[int(rng.integers(len(items)))]

    def one() -> str:
        kind = int(rng.integers(6))
        if kind == 0:
            return f"Write a {pick(['Python', 'Python', 'JavaScript', 'Java'])} function that {pick(_CODE)}."
        if kind == 1:
            return f"Translate to {pick(_LANGUAGES)}: {pick(_SENTENCES)}"
        if kind == 2:
            a, b, c = int(rng.integers(3, 40)), int(rng.integers(41, 200)), int(rng.integers(2, 13))
            return pick(_SUMS).format(n=pick(_NAMES), a=a, b=b, c=c)
        return pick(_ASK).format(t=pick(_TOPICS), u=pick(_TOPICS))

    return [one() for _ in range(count)]
