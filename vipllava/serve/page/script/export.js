// The conversation as files: JSON with the marks as geometry, and the picture as the models saw it.

async function exportConversation(page) {
  const {view} = page.answers;
  const rounds = view.rounds.map((round) => ({
    question: round.question,
    asked: round.asked,
    regions: round.marks,
    words: round.words,
    sampling: round.sampling,
    vote: round.vote,
    answers: round.answers.map((answer) => ({
      model: answer.name || answer.letter, text: answer.text, state: answer.state, rating: answer.rating,
    })),
  }));
  const whole = {format: 'vipllava-conversation', version: 1, picture: view.picture, rounds};
  const text = JSON.stringify(whole, null, 2);
  download('conversation.json', new Blob([text], {type: 'application/json'}));
  const last = view.rounds[view.rounds.length - 1];
  if (!last || !last.drawn) return;
  try {
    const response = await fetch(route(`drawn/${last.drawn}.png`));
    if (!response.ok) throw new Error(String(response.status));
    download('conversation.png', await response.blob());
  } catch (error) {
    page.say(error.message, true);
  }
}
