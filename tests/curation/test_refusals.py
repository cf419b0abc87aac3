"""Refusals in many words, and answers that sound like one."""

import pytest

from conftest import REPOSITORY
from forgebook.curation.refusals import refusal_in
from support_planted import read

REFUSALS = """\
I'm sorry, but I can't help with that request.
Sorry, I won't be summarizing this one for you.
Sorry, but I cannot do that.
Sorry, I'm unable to help with this.
My apologies, but I am not able to provide that information.
Apologies, I can't share that.
Unfortunately, I cannot fulfil this request.
Unfortunately I don't have access to real-time data.
I'm afraid I can't do that.
I am afraid that I cannot assist you with this.
I regret to inform you that I cannot complete this task.
I don't feel comfortable answering this question.
I'm not comfortable writing that.
I do not have personal opinions, as I am a language model.
As a language model, I don't have feelings.
As an AI, I am not able to browse the web.
I'm just an AI and can't give medical advice.
I can't assist with that.
I cannot help you with that.
I won't help with this.
I will not generate that content.
I must decline this request.
I have to decline.
I'm going to have to decline to answer.
I'd rather not answer that.
This request goes against my guidelines.
That would violate my guidelines, so I can't continue.
It is not appropriate for me to answer.
I am unable to comply with this request.
I'm not able to process personal information.
I can't continue with this conversation.
I cannot summarize private messages.
I can't provide instructions for that.
Sorry, I can't answer this.
I'm sorry. I can't do this for you.
I apologize, but as a language model I cannot help.
I am not allowed to talk about this topic.
I'm not programmed to discuss this.
I can't do that, but a colleague of mine certainly will.
I don't have enough information to answer, and I cannot access the internet.
Sorry, I can't provide legal advice on this matter.
I'm sorry, but I'm not able to provide a definitive answer.
I'm really sorry, but I can't assist you with planning that.
Unfortunately, I am unable to provide real-time information about the weather.
As an AI assistant, I cannot form personal opinions.
I am only a language model and cannot see images.
I cannot and will not help you with this.
I can't share personal details about private individuals.
I apologize, but I cannot generate content of that kind.
Sorry, that's not something I can help with.
I don't have personal experiences or feelings.
I'm afraid I don't have access to that document.
I cannot in good conscience write this letter.
My programming does not allow me to discuss this.
I won't be able to help with that.
I am not able to open links or browse websites.
Unfortunately, I cannot browse the internet.
I'm sorry, I don't understand the request and cannot respond.
That's not something I'm able to do.
I must respectfully decline to answer.
I'm unable to verify this claim.
I can not give you medical advice; see a doctor.
Regrettably, I am not permitted to reveal that.
Sorry, but I'm not able to discuss that topic.
I'm sorry, but as an AI language model I can't predict the future.
I cannot provide you with that information.
Unfortunately, I can't access your account.
I will not write that essay for you.
I am unable to view attachments.
I can't help with planning something dangerous.
I do not have the ability to send emails.
I'm sorry, I am unable to assist further.
I apologize for the inconvenience, but I cannot complete this request.
As a large language model, I have no access to your files.
My guidelines do not permit me to answer.
Sorry, I can't tell you that.
I'm not going to help you write this.
I can't comment on ongoing cases.
I cannot fulfill this.
I'm sorry, but that is something I cannot do.
I don't have access to real-time information.
I'm sorry, but I cannot fulfill your request at this time.
I can't write code that harms others.
Sorry, I do not answer questions of that kind.
I'm unable to do that.
I will have to decline this one.
Unfortunately, as an AI I have no way to check your order.
I cannot offer tax advice.
I'm an AI language model, so I have no body.
I can't answer questions on elections.
This violates my policy, so I have to stop here.
I apologize, but I'm unable to translate this text.
Sorry, but I don't have information about private persons.
I cannot look up live prices.""".splitlines()
OTHERS = """\
Sorry about your tablet, Conrad. Our workshop will see to it.
We are sorry that your kettle arrived broken; a new one is on its way.
Unfortunately, the train from Paris is late by an hour.
I can't wait to see you on Friday!
I cannot recommend this book enough: it is wonderful.
Dear team, I am unable to attend the meeting tomorrow because of a dentist appointment. Best, Ann
Sorry for the late reply. I was travelling last week and had no connection.
You can't divide by zero, because no number times zero gives one.
She said that she couldn't come.
I can help with that. First open the settings, then choose Network.
I'm sorry to hear that you are unwell. Rest, and drink a lot of water.
The phrase "I'm sorry, but I can't" is a stock refusal.
I won the race yesterday.
Unfortunately, this plan has two weaknesses: it is slow, and it is expensive.
I apologize for the delay; your refund was sent today.
I can't believe how fast the year has gone.
I don't think so: whales are mammals.
We will not charge you for the repair.
Sorry, the shop is closed on Sundays; it opens at nine on Monday.
If I can't sleep, I read a book.
I can't stop laughing at this joke.
I cannot tell you how happy this letter made me.
As an AI engineer, you will often work with data pipelines.
As a language teacher, she speaks four languages.
I'm afraid of spiders, said the boy.
Unfortunately, I missed the bus, so I walked home.
I have to decide between two offers.
Our guidelines ask for short sentences.
I don't have a car, so I take the bus (a diary entry).
Sorry, I was wrong: the answer is 42.
I can't find my keys, so I will write a note and help you tomorrow.
Sorry, I cannot come to the party; see you next week.
I won't be at home on Monday, but my sister can open the door.
Unfortunately, I do not like cheese, she said, and ate the bread.
This is something I can do in an hour: paint the fence.
I'm sorry that I could not answer sooner. Your parcel was sent on Monday.
I am not able to swim, so the boat frightens me.
I will not forget how you helped me to write my first book.
I don't know the exact number, but it is about forty.
As an artist, I paint every day.""".splitlines()


@pytest.mark.parametrize("answer", REFUSALS)
def test_a_refusal(answer):
    assert refusal_in(answer)


@pytest.mark.parametrize("answer", OTHERS)
def test_no_refusal(answer):
    assert refusal_in(answer) is None


def test_no_refusal_in_real_messages_and_the_repository_s_answers():
    messages = (REPOSITORY / "tests/real/sms_spam.tsv").read_text().splitlines()
    answers = [row["messages"][-1]["content"] for row in read("train.jsonl")]
    assert len(messages) > 100 and not any(map(refusal_in, [*messages, *answers]))
