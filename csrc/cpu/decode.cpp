#include "decode.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <stdexcept>
#include <string>

#include "../guard.h"
#include "team.h"

namespace tamingfast {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::int64_t kWorthMeasuring = 32;                 // with fewer steps, none are guessed unless asked for
constexpr std::int64_t kMostAbove = std::int64_t{16} << 20;  // logits that are kept for guesses

const DecodeParams& checked(const DecodeParams& d, const Engine& engine) {
  require_range("choices", d.choices, 1, engine.geometry().vocab_size);
  require(d.fed >= 0, "fed", d.fed, "at least 0");
  require(d.lookahead >= 0, "lookahead", d.lookahead, "at least 1, or 0 to choose");
  std::vector<bool> seen(engine.slots(), false);
  for (std::int64_t b = 0; b < d.batch; ++b) {
    for (const std::int64_t* slots : {d.slots, d.null_slots}) {
      if (!slots) continue;
      require_range("slot", slots[b], 0, engine.slots() - 1);
      require(!seen[slots[b]], "slot", slots[b], "every slot at most once");
      seen[slots[b]] = true;
      require(d.fed <= engine.length(slots[b]), "fed", d.fed, "at most the length of every slot");
    }
  }
  require_range("prefix", d.prefix, 0, d.length);
  for (std::int64_t i = 0; i < d.count; ++i) {
    require_range("steps", d.steps[i], i == 0 ? 1 : d.steps[i - 1] + 1, d.length - 1);
    require(d.steps[i] <= engine.capacity(), "steps", d.steps[i],
            "at most " + std::to_string(engine.capacity()) + ", one more than the cache holds");
  }
  return d;
}

}  // namespace

// Nothing is kept where no column has two steps, because then nothing lies above anything.
Above::Above(const DecodeParams& d) : choices_(d.choices) {
  if (d.lookahead == 1) return;
  std::map<std::uint32_t, std::int64_t> columns;
  for (std::int64_t i = 0; i < d.count; ++i) columns.emplace(d.columns[i], static_cast<std::int64_t>(columns.size()));
  columns_ = static_cast<std::int64_t>(columns.size());
  if (columns_ == d.count || columns_ > kMostAbove / choices_ / std::max<std::int64_t>(d.batch, 1)) return;
  for (std::int64_t i = 0; i < d.count; ++i) column_of_.push_back(columns[d.columns[i]]);
  known_.assign(d.batch * columns_, 0);
  logits_.resize(d.batch * columns_ * choices_);
}

const float* Above::find(std::int64_t b, std::int64_t step) const {
  if (column_of_.empty()) return nullptr;
  const std::int64_t at = b * columns_ + column_of_[step];
  return known_[at] ? logits_.data() + at * choices_ : nullptr;
}

void Above::keep(std::int64_t b, std::int64_t step, const float* logits) {
  if (column_of_.empty()) return;
  const std::int64_t at = b * columns_ + column_of_[step];
  known_[at] = 1;
  std::copy_n(logits, choices_, logits_.data() + at * choices_);
}

Decoding::Decoding(Engine& engine, const DecodeParams& params, const Engine::Poll& poll)
    : engine_(engine),
      d_(checked(params, engine)),
      poll_(poll),
      lookahead_(params.lookahead == 0 && params.count < kWorthMeasuring ? 1 : params.lookahead),
      failed_(params.count),
      sequences_(params.batch),
      above_(params) {
  for (std::int64_t b = 0; b < d_.batch; ++b) {
    Sequence& sequence = sequences_[b];
    sequence.fed = d_.fed;
    sequence.goal = d_.count;
    sequence.guesses.assign(d_.count, -1);
    for (std::int64_t i = 0; i < d_.count; ++i)
      if (wanted(b, i)) sequence.last = d_.steps[i];
    seek(b);
  }
  const Worker worker{ChoiceScratch(engine.geometry().vocab_size), std::vector<float>(d_.choices)};
  workers_.assign(engine.threads(), worker);
  if (!engine.draft() || lookahead_ == 1) return;
  draft_tokens_.assign(d_.sequences, d_.sequences + d_.batch * d_.length);
  draft_params_ = d_;
  draft_params_.sequences = draft_tokens_.data();
  draft_params_.fed = draft_params_.lookahead = 0;
  draft_ = std::make_unique<Decoding>(*engine.draft(), draft_params_, poll);
  for (std::int64_t b = 0; b < d_.batch; ++b) draft_->truncate(b, 0);
  draft_seconds_ = engine.draft()->pass_cost(poll).at(copies());
}

std::int32_t Decoding::run(const Engine::Progress& progress) {
  do report(progress);
  while (pass());
  return found();
}

bool Decoding::pass() {
  active_.clear();
  for (std::int64_t b = 0; b < d_.batch; ++b) {
    const Sequence& sequence = sequences_[b];
    const std::int64_t last = std::min(sequence.goal, failed_ + 1);
    if (!sequence.failure && sequence.next < std::min(last, d_.count)) active_.push_back(b);
  }
  if (active_.empty()) return false;
  const std::vector<std::int64_t> rows = widths();
  if (drafting_) draft(rows);
  guess(rows);
  feed(rows);
  choose_rows();
  accept();
  return true;
}

// Moves on to the next wanted step.
void Decoding::seek(std::int64_t b) {
  std::int64_t& next = sequences_[b].next;
  while (next < d_.count && !wanted(b, next)) ++next;
}

// The first position to feed. The last known token is fed again if the slot holds it already, because its logits are
// needed; tokens of the unmasked prefix see one another, so they go in together.
std::int64_t Decoding::start(const Sequence& sequence) const {
  const std::int64_t first = std::min(sequence.fed, d_.steps[sequence.next] - 1);
  return first < engine_.geometry().n_unmasked ? 0 : first;
}

// Rows from the last known token on. There are no guesses before the first logits, nor where earlier tokens would see
// them.
std::int64_t Decoding::most_rows(const Sequence& sequence) const {
  const std::int64_t known = d_.steps[sequence.next];
  if (sequence.width == 0 || known < engine_.geometry().n_unmasked) return 1;
  return sequence.last - known + 1;
}

std::vector<std::int64_t> Decoding::widths() {
  std::vector<std::int64_t> found;
  if (lookahead_ > 0) {
    drafting_ = draft_ != nullptr;
    for (const std::int64_t b : active_) found.push_back(std::min(lookahead_, most_rows(sequences_[b])));
    return found;
  }
  std::vector<Contender> contenders, drafted;
  std::int64_t known = 0;
  bool first = true;
  for (const std::int64_t b : active_) {
    const Sequence& sequence = sequences_[b];
    contenders.push_back({&sequence.survival, most_rows(sequence)});
    drafted.push_back({&sequence.drafted, most_rows(sequence)});
    known += d_.steps[sequence.next] - start(sequence);
    first = first && sequence.width == 0;
  }
  if (first) return std::vector<std::int64_t>(active_.size(), 1);
  const PassCost cost = engine_.pass_cost(poll_).times(copies());
  const Shares own = share_rows(cost, choosing_, known, contenders);
  drafting_ = false;
  if (!draft_) return own.rows;
  const Shares drafts = share_drafts(cost, choosing_ + draft_seconds_, known, drafted);
  drafting_ = drafts.rate > own.rate;
  return drafting_ ? drafts.rows : own.rows;
}

// Calls visit(step) for the wanted steps whose tokens a window of this width feeds or chooses.
template <class Visit>
void Decoding::window(std::int64_t b, std::int64_t width, Visit&& visit) const {
  const std::int64_t first = sequences_[b].next, stop = d_.steps[first] + width;
  for (std::int64_t i = first; i < d_.count && d_.steps[i] < stop; ++i)
    if (wanted(b, i)) visit(i);
}

// Calls body(row, worker) for each row, on several threads.
template <class Body>
void Decoding::each(std::vector<Row>& rows, Body&& body) {
  const Clock::time_point begun = Clock::now();
  const std::int64_t count = static_cast<std::int64_t>(rows.size());
  const std::int64_t threads = std::min<std::int64_t>(static_cast<std::int64_t>(workers_.size()), count);
  parallel(static_cast<int>(threads), [&](int thread, int of) {
    const Range mine = share(count, thread, of);
    for (std::int64_t i = mine.first; i < mine.last; ++i) body(rows[i], workers_[thread]);
  });
  const double seconds = std::chrono::duration<double>(Clock::now() - begun).count() / static_cast<double>(count);
  choosing_ = choosing_ == 0.0 ? seconds : std::min(choosing_, seconds);
}

std::int64_t Decoding::choose_from(const float* logits, std::int64_t b, std::int64_t step, Worker& worker) const {
  return choose(logits, d_.choices, d_.choice, {d_.images[b], d_.rows[step], d_.columns[step]}, worker.scratch);
}

// Guesses the tokens that enter the windows; those that stay keep the choice of the pass before.
void Decoding::guess(const std::vector<std::int64_t>& widths) {
  std::vector<Row> entering;
  for (std::size_t i = 0; i < active_.size(); ++i) {
    const std::int64_t b = active_[i];
    window(b, widths[i] - 1, [&](std::int64_t step) {
      if (sequences_[b].guesses[step] < 0) entering.push_back({b, step, -1});
    });
  }
  if (entering.empty()) return;
  each(entering, [&](Row& row, Worker& worker) { row.token = estimate(row.b, row.step, worker); });
  for (const Row& row : entering) sequences_[row.b].guesses[row.step] = row.token;
}

// A guess from the logits to the left and above, with the step's own noise; negative if they have none.
std::int64_t Decoding::estimate(std::int64_t b, std::int64_t step, Worker& worker) const {
  const Sequence& sequence = sequences_[b];
  const float* left = sequence.left.data();
  const float* above = above_.find(b, step);
  if (!above) return choose_from(left, b, step, worker);
  for (std::int64_t v = 0; v < d_.choices; ++v) worker.mean[v] = 0.5f * (left[v] + above[v]);
  return choose_from(worker.mean.data(), b, step, worker);
}

void Decoding::feed(const std::vector<std::int64_t>& widths) {
  std::vector<Span> spans;
  std::vector<std::int64_t> tokens;
  rows_.clear();
  std::int64_t logits = 0;
  for (std::size_t i = 0; i < active_.size(); ++i) {
    const std::int64_t b = active_[i], width = widths[i];
    Sequence& sequence = sequences_[b];
    const std::int64_t known = d_.steps[sequence.next], first = start(sequence);
    const std::int64_t* own = d_.sequences + b * d_.length;
    const std::size_t begun = tokens.size();
    tokens.insert(tokens.end(), own + first, own + known + width - 1);
    window(b, width - 1, [&](std::int64_t step) {
      // A step without a guess repeats the token before it.
      std::int64_t& guess = sequence.guesses[step];
      std::int64_t& token = tokens[begun + static_cast<std::size_t>(d_.steps[step] - first)];
      token = guess = guess < 0 ? *(&token - 1) : guess;
    });
    window(b, width, [&](std::int64_t step) { rows_.push_back({b, step, -1}); });
    spans.push_back({d_.slots[b], first, known + width - 1 - first, width});
    sequence.logits = logits;
    sequence.width = width;
    logits += width;
  }
  logits_.resize(copies() * logits * engine_.geometry().vocab_size);
  if (d_.null_slots) add_second(spans, tokens);
  try {
    engine_.step(spans, tokens.data(), logits_.data(), poll_);
  } catch (...) {
    for (const std::int64_t b : active_) truncate(b, d_.steps[sequences_[b].next]);  // guesses may have been fed
    throw;
  }
  if (d_.null_slots) guide();
}

// Appends the spans of the second sequences, in the same order.
void Decoding::add_second(std::vector<Span>& spans, std::vector<std::int64_t>& tokens) const {
  const std::size_t count = spans.size();
  std::size_t from = 0;
  for (std::size_t i = 0; i < count; ++i) {
    Span span = spans[i];
    span.slot = d_.null_slots[active_[i]];
    for (std::int64_t at = span.start; at < span.start + span.count; ++at, ++from)
      tokens.push_back(at < d_.prefix ? d_.null_token : tokens[from]);
    spans.push_back(span);
  }
}

// Combines the logits of both sequences. ops/choice.py has the same formula (guided).
void Decoding::guide() {
  const std::int64_t vocab = engine_.geometry().vocab_size;
  const float* null = logits_.data() + logits_.size() / 2;
  for (const std::int64_t b : active_) {
    const Sequence& sequence = sequences_[b];
    for (std::int64_t row = 0; row < sequence.width; ++row) {
      const float scale = d_.scales[d_.steps[sequence.next] + row];
      float* own = logits_.data() + (sequence.logits + row) * vocab;
      const float* without = null + (sequence.logits + row) * vocab;
      for (std::int64_t v = 0; v < vocab; ++v) own[v] = without[v] + (own[v] - without[v]) * scale;
    }
  }
}

// Drops what the slots of a sequence hold beyond `length`.
void Decoding::truncate(std::int64_t b, std::int64_t length) {
  for (const std::int64_t* slots : {d_.slots, d_.null_slots})
    if (slots) engine_.truncate(slots[b], std::min(engine_.length(slots[b]), length));
}

void Decoding::choose_rows() {
  const auto logits_of = [&](const Row& row) {
    const Sequence& sequence = sequences_[row.b];
    const std::int64_t at = sequence.logits + d_.steps[row.step] - d_.steps[sequence.next];
    return logits_.data() + at * engine_.geometry().vocab_size;
  };
  each(rows_, [&](Row& row, Worker& worker) { row.token = choose_from(logits_of(row), row.b, row.step, worker); });
  if (d_.lookahead == 1) return;
  for (const Row& row : rows_) above_.keep(row.b, row.step, logits_of(row));
  for (const std::int64_t b : active_) {
    const std::int64_t vocab = engine_.geometry().vocab_size;
    const auto last = logits_.cbegin() + (sequences_[b].logits + sequences_[b].width) * vocab;
    sequences_[b].left.assign(last - vocab, last);
  }
}

void Decoding::accept() {
  const std::int64_t before = committed_;
  auto row = rows_.cbegin();
  for (const std::int64_t b : active_) {
    const auto first = row;
    while (row != rows_.cend() && row->b == b) ++row;
    accept(b, first, row);
  }
  engine_.count_pass(static_cast<std::int64_t>(logits_.size()) / engine_.geometry().vocab_size, committed_ - before);
}

// Commits the sequence's choices up to the first that differs from its guess; later choices become guesses.
void Decoding::accept(std::int64_t b, Rows row, const Rows last) {
  Sequence& sequence = sequences_[b];
  const std::int64_t stop = d_.steps[sequence.next] + sequence.width - 1;  // one past the last position fed
  const auto fed = [&](const Row& one) { return d_.steps[one.step] < stop; };
  const std::int64_t guesses = std::count_if(row, last, fed);
  std::int64_t right = 0;
  sequence.fed = stop;
  for (bool known = true; known && row != last; ++row) {
    const std::int64_t position = d_.steps[row->step];
    sequence.next = row->step;
    if (row->token < 0) {
      sequence.failure = row->token;
      sequence.fed = position;
      failed_ = std::min(failed_, row->step);
      break;
    }
    d_.sequences[b * d_.length + position] = row->token;
    ++committed_;
    ++sequence.next;
    if (!fed(*row)) continue;
    known = row->token == sequence.guesses[row->step];
    if (known)
      ++right;
    else
      sequence.fed = position;
  }
  for (; row != last; ++row) sequence.guesses[row->step] = row->token;
  (drafting_ ? sequence.drafted : sequence.survival).observe(right, guesses);
  seek(b);
  truncate(b, sequence.fed);
  if (draft_) draft_->correct(b, d_.sequences + b * d_.length, sequence.next);
}

// Guesses by the copy of the model.
void Decoding::draft(const std::vector<std::int64_t>& widths) {
  const Clock::time_point begun = Clock::now();
  const std::int64_t before = draft_->committed_;
  for (Sequence& sequence : draft_->sequences_) sequence.goal = 0;
  for (std::size_t i = 0; i < active_.size(); ++i) {
    std::int64_t goal = 0;
    window(active_[i], widths[i] - 1, [&](std::int64_t step) { goal = step + 1; });
    draft_->sequences_[active_[i]].goal = goal;
  }
  while (draft_->pass());
  for (std::size_t i = 0; i < active_.size(); ++i) {
    const std::int64_t b = active_[i], drawn = draft_->sequences_[b].next;
    window(b, widths[i] - 1, [&](std::int64_t step) {
      if (step < drawn) sequences_[b].guesses[step] = draft_tokens_[b * d_.length + d_.steps[step]];
    });
  }
  const std::int64_t count = draft_->committed_ - before;
  if (count == 0) return;
  const double seconds = std::chrono::duration<double>(Clock::now() - begun).count() / static_cast<double>(count);
  draft_seconds_ += (seconds - draft_seconds_) / 8;
}

// Goes on from the right tokens before step `next`; tokens of its own after a wrong one become guesses.
void Decoding::correct(std::int64_t b, const std::int64_t* right, std::int64_t next) {
  Sequence& sequence = sequences_[b];
  const std::int64_t stop = next < d_.count ? d_.steps[next] : d_.length;
  std::int64_t* own = d_.sequences + b * d_.length;
  const std::int64_t same = std::mismatch(right, right + stop, own).first - right;
  if (same == stop && sequence.next >= next) return;
  for (std::int64_t step = next; step < sequence.next; ++step)
    if (wanted(b, step)) sequence.guesses[step] = own[d_.steps[step]];
  std::copy_n(right, stop, own);
  sequence.next = next;
  sequence.fed = std::min(sequence.fed, same);
  truncate(b, sequence.fed);
}

// Reports the steps that all sequences have committed.
void Decoding::report(const Engine::Progress& progress) {
  std::int64_t done = d_.count;
  for (const Sequence& sequence : sequences_) done = std::min(done, sequence.next);
  while (reported_ < done) {
    ++reported_;
    if (progress) progress(reported_);
  }
}

// Why the first step without a token has none, in all sequences.
std::int32_t Decoding::found() const {
  std::int32_t found = 0;
  for (const Sequence& sequence : sequences_)
    if (sequence.failure && sequence.next == failed_)
      found |= sequence.failure == kChoiceNan ? kFoundNan : kFoundNothing;
  return found;
}

}  // namespace tamingfast
