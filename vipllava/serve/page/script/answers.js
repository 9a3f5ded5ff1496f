// The conversation: questions, and the answers of one to four models side by side.

const NO_VIEW = {number: 0, rounds: [], busy: false, blind: false, notice: null};

class Answers {
  constructor(page, root) {
    this.page = page;
    this.view = NO_VIEW;
    this.waiting = false;
    this.list = el('div', {class: 'vip-rounds', role: 'log', 'aria-live': 'polite', tabindex: '0', 'data-t-label': 'conversation'});
    this.notice = el('p', {class: 'vip-notice', role: 'alert', hidden: true});
    this.clearButton = this.action('clear', () => page.clear(), 'M4 6h12M8 6V4h4v2M6 6l.7 10h6.6L14 6');
    this.again = this.action('regenerate', () => {
      this.expect();
      page.trigger('regenerate', {});
    }, 'M16 10a6 6 0 1 1-2-4.5M16 3v4h-4');
    this.save = this.action('export', () => exportConversation(page), 'M10 4v9M6 9.5l4 4 4-4M4 16h12');
    this.actions = el('div', {class: 'vip-actions'}, this.again, this.save, this.clearButton);
    this.empty = el('p', {class: 'vip-no-talk', 'data-t': 'no_talk'});
    this.dialog = el('dialog', {class: 'vip-dialog', 'data-t-label': 'seen', onclick: () => this.dialog.close()});
    root.append(el('div', {class: 'vip-talk-scroll'}, this.empty, this.list), this.notice, this.actions, this.dialog);
    this.rounds = []; // per round its node, and what is in it
  }

  action(name, onclick, path) {
    return el('button', {type: 'button', class: 'vip-action', onclick}, icon(path), el('span', {'data-t': name}));
  }

  get busy() {
    return this.waiting || this.view.busy;
  }

  // A question is on its way: nothing else is until its first view is here.
  expect() {
    this.waiting = true;
    this.update();
  }

  take(view) {
    const before = this.view;
    if (view.number < before.number) return;
    this.view = view;
    this.waiting = false;
    const {page} = this;
    if (view.notice && view.notice.kind === 'error') page.asked = null;
    if (page.asked && view.rounds.length) {
      page.mentioned = [...(view.rounds.length === 1 ? [] : page.mentioned), ...page.asked.marks];
      if (page.question.text.value === page.asked.text) page.question.clear();
      page.asked = null;
    }
    if (!view.rounds.length) page.mentioned = [];
    const grew = view.rounds.length > before.rounds.length;
    this.update();
    if (view.busy || grew) this.follow(grew);
    if (before.busy && !view.busy && view.rounds.length) page.say(t('answered'), false, true);
  }

  follow(always) {
    const box = this.list.parentElement;
    const near = box.scrollHeight - box.scrollTop - box.clientHeight < 160;
    if (always || near) box.scrollTop = box.scrollHeight;
  }

  update() {
    const {view} = this;
    while (this.rounds.length > view.rounds.length) this.rounds.pop().node.remove();
    view.rounds.forEach((round, index) => {
      const last = index === view.rounds.length - 1;
      const key = JSON.stringify([round, view.blind, view.busy && last, last, TEXTS.language]);
      const old = this.rounds[index];
      if (old && old.key === key) return;
      if (old && old.shape === shapeOf(round)) {
        this.refresh(old.node, round, last);
        old.key = key;
        return;
      }
      const node = this.build(round);
      this.refresh(node, round, last);
      if (old) old.node.replaceWith(node);
      else this.list.append(node);
      this.rounds[index] = {key, node, shape: shapeOf(round)};
    });
    const any = view.rounds.length > 0;
    this.empty.hidden = any;
    this.actions.hidden = !any;
    for (const button of [this.again, this.save]) button.disabled = this.busy;
    this.list.setAttribute('aria-busy', String(this.busy));
    this.page.question.ask.hidden = this.busy;
    this.page.question.stop.hidden = !this.busy;
    this.showNotice();
  }

  showNotice() {
    const {notice} = this.view;
    this.notice.hidden = !notice;
    if (!notice) return;
    this.notice.classList.toggle('error', notice.kind === 'error');
    this.notice.textContent = notice.kind === 'error' ? notice.text : t(notice.kind);
  }

  build(round) {
    const thumb = round.drawn
      ? el(
        'button', {type: 'button', class: 'vip-thumb', 'aria-label': t('seen'), title: t('seen'), onclick: () => this.enlarge(round.drawn)},
        el('img', {src: route(`drawn/${round.drawn}/small.jpg`), alt: '', loading: 'lazy'}),
      )
      : null;
    const asked = el('div', {class: 'vip-asked'}, thumb, el('p', {class: 'vip-asked-text'}, round.asked));
    const grid = el('div', {class: 'vip-answers', 'data-count': round.answers.length});
    round.answers.forEach((answer, place) => grid.append(this.panel(place)));
    return el('article', {class: 'vip-round'}, asked, grid, el('div', {class: 'vip-vote'}));
  }

  panel(place) {
    return el(
      'section', {class: 'vip-answer', 'data-place': place},
      el('h3', {class: 'vip-name'}), el('div', {class: 'vip-text'}),
      el('p', {class: 'vip-answer-note'}), el('div', {class: 'vip-rate'}),
    );
  }

  refresh(node, round, last) {
    const {view} = this;
    round.answers.forEach((answer, place) => {
      const panel = node.querySelector(`[data-place="${place}"]`);
      const name = answer.name === null ? t('model_letter', {letter: answer.letter}) : answer.name;
      panel.dataset.state = answer.state;
      panel.querySelector('.vip-name').textContent = name;
      panel.querySelector('.vip-name').title = name;
      const text = panel.querySelector('.vip-text');
      // The server made it of Markdown, without any HTML of the model's.
      if (text.dataset.html !== answer.html) {
        text.innerHTML = answer.html;
        text.dataset.html = answer.html;
      }
      text.classList.toggle('writing', answer.state === 'running' || answer.state === 'waiting');
      panel.querySelector('.vip-answer-note').textContent = noteOf(answer);
      const rate = panel.querySelector('.vip-rate');
      rate.replaceChildren(...(last && !view.busy ? this.rating(answer, place) : []));
    });
    const vote = node.querySelector('.vip-vote');
    vote.replaceChildren(...(round.answers.length > 1 ? this.voting(round, last) : []));
  }

  rating(answer, place) {
    const rate = (kind, path, pressed) =>
      el(
        'button',
        {
          type: 'button', class: 'vip-rate-button', 'aria-label': t(`rate_${kind}`), title: t(`rate_${kind}`),
          'aria-pressed': String(pressed), 'data-kind': kind,
          onclick: () => this.page.trigger('rate', {place, kind}),
        },
        icon(path),
      );
    const copy = el(
      'button',
      {
        type: 'button', class: 'vip-rate-button', 'aria-label': t('copy'), title: t('copy'),
        onclick: () => navigator.clipboard.writeText(answer.text).then(() => this.page.say(t('copied'))),
      },
      icon('M7 7V4h9v9h-3M4 7h9v9H4z'),
    );
    const thumb = 'M3 9h3v7H3zM6 9l3-6c1.5 0 2 1 2 2v3h4.5c1 0 1.6.8 1.4 1.7l-1.2 5c-.2.8-.8 1.3-1.6 1.3H6';
    const down = 'M3 11h3V4H3zM6 11l3 6c1.5 0 2-1 2-2v-3h4.5c1 0 1.6-.8 1.4-1.7l-1.2-5C15.5 4.500 14.900 4 14.100 4H6';
    return [
      rate('up', thumb, answer.rating === 'up'), rate('down', down, answer.rating === 'down'),
      rate('flag', 'M5 17V3h10l-2 3.500L15 10H5', answer.flagged), navigator.clipboard ? copy : null,
    ].filter(Boolean);
  }

  voting(round, last) {
    const {page, view} = this;
    const name = (answer) => (answer.name === null ? t('model_letter', {letter: answer.letter}) : answer.name);
    if (round.vote) {
      const winner = round.answers.find((answer) => answer.letter === round.vote);
      const said = winner ? t('voted', {model: name(winner)}) : t(`voted_${round.vote}`);
      return [el('p', {class: 'vip-voted'}, said)];
    }
    if (!last || view.busy) return [];
    const vote = (choice, label) =>
      el('button', {type: 'button', class: 'vip-button small', 'data-choice': choice, onclick: () => page.trigger('vote', {choice})}, label);
    const letters = round.answers.map((answer) =>
      vote(answer.letter, t('vote_better', {model: view.blind ? answer.letter : shortened(answer.name)})));
    return [...letters, vote('tie', t('vote_tie')), vote('bad', t('vote_bad'))];
  }

  enlarge(drawn) {
    const close = el('button', {type: 'button', class: 'vip-button small', 'data-t': 'close'}, t('close'));
    this.dialog.replaceChildren(el('img', {src: route(`drawn/${drawn}.png`), alt: t('seen')}), close);
    this.dialog.showModal();
  }
}

const shapeOf = (round) => JSON.stringify([round.asked, round.drawn, round.answers.length]);
const shortened = (name) => (name && name.length > 24 ? `${name.slice(0, 22)}…` : name || '');

function noteOf(answer) {
  if (answer.state === 'failed') return answer.error || t('failed');
  if (answer.state === 'stopped') return t('stopped');
  if (answer.state === 'done' && answer.cut) return t('cut');
  if (answer.state === 'done' && !answer.text) return t('no_answer');
  return '';
}
