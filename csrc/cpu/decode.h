// One call of Engine::decode. Guessed tokens are fed behind the last known one, and every row's token is chosen with
// its own noise. As long as a choice equals the guess, the next row's choice is the sequential one, too: that prefix
// and one token more are committed. So the tokens are those of decoding one after the other; only the number of passes
// changes.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "choose.h"
#include "engine.h"
#include "lookahead.h"

namespace tamingfast {

// The latest logits in each column of each sequence's grid, to guess the token below from.
class Above {
 public:
  explicit Above(const DecodeParams& params);
  const float* find(std::int64_t b, std::int64_t step) const;  // null if there are none
  void keep(std::int64_t b, std::int64_t step, const float* logits);

 private:
  std::int64_t columns_ = 0, choices_;
  std::vector<std::int64_t> column_of_;  // (steps,), empty if nothing is kept
  std::vector<std::uint8_t> known_;      // (batch, columns)
  std::vector<float> logits_;            // (batch, columns, choices)
};

class Decoding {
 public:
  // Throws std::invalid_argument, which names the argument.
  Decoding(Engine& engine, const DecodeParams& params, const Engine::Poll& poll);
  std::int32_t run(const Engine::Progress& progress);  // returns what Engine::decode does

 private:
  struct Sequence {
    std::int64_t next = 0;              // the first wanted step that is not committed; the number of steps at the end
    std::int64_t last = 0;              // position of the last wanted step
    std::int64_t fed = 0;               // positions whose keys and values are valid
    std::int64_t failure = 0;           // kChoiceNan or kChoiceNothing, if step `next` has no token
    std::int64_t width = 0;             // rows of logits of the latest pass, 0 before it
    std::int64_t logits = 0;            // the first of them
    std::int64_t goal = 0;              // the step to reach
    std::vector<std::int64_t> guesses;  // (steps,), -1 where there is none
    std::vector<float> left;            // the last row of logits of the latest pass
    Survival survival, drafted{expected_of_drafts()};
  };
  // A row of logits, from which the token of a wanted step is chosen; or such a token to guess.
  struct Row {
    std::int64_t b, step, token;
  };
  using Rows = std::vector<Row>::const_iterator;
  struct Worker {
    ChoiceScratch scratch;
    std::vector<float> mean;
  };

  bool pass();
  void correct(std::int64_t b, const std::int64_t* right, std::int64_t next);
  void draft(const std::vector<std::int64_t>& widths);
  std::int64_t most_rows(const Sequence& sequence) const;
  std::vector<std::int64_t> widths();
  void guess(const std::vector<std::int64_t>& widths);
  void feed(const std::vector<std::int64_t>& widths);
  void add_second(std::vector<Span>& spans, std::vector<std::int64_t>& tokens) const;
  void guide();
  void truncate(std::int64_t b, std::int64_t length);
  void choose_rows();
  void accept();
  void accept(std::int64_t b, Rows row, Rows last);
  std::int32_t found() const;
  void report(const Engine::Progress& progress);

  bool wanted(std::int64_t b, std::int64_t step) const { return d_.wanted[b * d_.count + step]; }
  std::int64_t copies() const { return d_.null_slots ? 2 : 1; }
  void seek(std::int64_t b);
  std::int64_t start(const Sequence& sequence) const;
  std::int64_t choose_from(const float* logits, std::int64_t b, std::int64_t step, Worker& worker) const;
  std::int64_t estimate(std::int64_t b, std::int64_t step, Worker& worker) const;
  template <class Body>
  void each(std::vector<Row>& rows, Body&& body);
  template <class Visit>
  void window(std::int64_t b, std::int64_t width, Visit&& visit) const;

  Engine& engine_;
  const DecodeParams& d_;
  const Engine::Poll& poll_;
  std::int64_t lookahead_;
  std::int64_t failed_;  // the first step that has no token; the number of steps if there is none
  std::int64_t reported_ = 0, committed_ = 0;
  std::vector<Sequence> sequences_;
  std::vector<std::int64_t> active_;  // the sequences that take part in the pass
  Above above_;
  std::vector<Worker> workers_;
  std::vector<Row> rows_;      // of the latest pass
  std::vector<float> logits_;  // of the latest pass
  // A copy of the model that guesses: decodes tokens of its own, which are corrected as the right ones become known.
  std::vector<std::int64_t> draft_tokens_;
  DecodeParams draft_params_{};
  std::unique_ptr<Decoding> draft_;
  bool drafting_ = false;       // whether it guesses for this pass
  double draft_seconds_ = 0.0;  // per token
  double choosing_ = 0.0;       // seconds to choose from a row: the least so far, which no other load disturbed
};

}  // namespace tamingfast
