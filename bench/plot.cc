// SPDX-License-Identifier: Apache-2.0
// See plot.h. Lines are labelled at their ends, so that nobody has to match colours; the legend repeats what each one
// is.
#include "bench/plot.h"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <utility>
#include <vector>

#include "msa/error.h"

namespace msa::bench {
namespace {

struct Series {
  Curve curve;
  const char* label;
  const char* colour;
  const char* dash;
  double width;
};
// Colours that the colour-blind tell apart (Okabe and Ito); dense ones dashed or grey. MSA last: on top.
constexpr Series kSeries[] = {
    {Curve::kTorchFloat32, "torch SDPA, float32", "#999999", "2 5", 2},
    {Curve::kTorchBFloat16, "torch SDPA, bfloat16", "#555555", "7 4", 2},
    {Curve::kDense, "dense_attention", "#e69f00", "", 2},
    {Curve::kMsa, "MSA (select + sparse)", "#0072b2", "", 3.5},
};

struct Point {
  double context = 0;
  double milliseconds = 0;
};

struct Line {
  const Series* series = nullptr;
  std::vector<Point> points;
};

// printf into a string; numbers of the picture need two decimals and no library.
__attribute__((format(printf, 1, 2))) std::string format(const char* pattern, ...) {
  va_list arguments;
  va_start(arguments, pattern);
  char text[512];
  std::vsnprintf(text, sizeof text, pattern, arguments);
  va_end(arguments);
  return text;
}

std::string tokens_text(double tokens) {
  if (tokens >= 1024 * 1024 && std::fmod(tokens, 1024 * 1024) == 0) return format("%gM", tokens / (1024 * 1024));
  if (tokens >= 1024 && std::fmod(tokens, 1024) == 0) return format("%gK", tokens / 1024);
  return format("%g", tokens);
}

std::string time_text(double milliseconds) {
  if (milliseconds >= 1000) return format("%g s", milliseconds / 1000);
  return milliseconds >= 1 ? format("%g ms", milliseconds) : format("%g µs", milliseconds * 1000);
}

// A logarithmic axis from `low` to `high`, at pixels `begin` to `end`.
struct Axis {
  double low, high, begin, end;
  double at(double value) const { return begin + (end - begin) * std::log(value / low) / std::log(high / low); }
};

std::string text(double x, double y, const std::string& content, const char* attributes) {
  return format("<text x=\"%.1f\" y=\"%.1f\" %s>", x, y, attributes) + content + "</text>\n";
}

std::string line(double x1, double y1, double x2, double y2, const char* attributes) {
  return format("<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" %s/>\n", x1, y1, x2, y2, attributes);
}

std::vector<Line> collect(const Plot& plot) {
  std::vector<Line> lines;
  for (const Series& series : kSeries) {
    Line found{&series, {}};
    for (const PlotPoint& point : plot.points) {
      if (point.curve == series.curve) found.points.push_back({point.context, point.seconds * 1e3});
    }
    std::sort(found.points.begin(), found.points.end(),
              [](const Point& a, const Point& b) { return a.context < b.context; });
    if (!found.points.empty()) lines.push_back(std::move(found));
  }
  return lines;
}

// Text between tags.
std::string escape(const std::string& content) {
  std::string escaped;
  for (const char c : content) {
    if (c == '<') {
      escaped += "&lt;";
    } else if (c == '&') {
      escaped += "&amp;";
    } else {
      escaped += c;
    }
  }
  return escaped;
}

}  // namespace

Plot prefill_plot(const OpBenchOptions& options, const OpBenchResult& result) {
  const auto number = [](std::int64_t value) { return static_cast<long long>(value); };
  Plot plot;
  plot.title = format("Attention of the last %lld tokens against the context", number(options.queries));
  plot.subtitle =
      format("%lld query / %lld kv heads, head dimension %lld, %lld blocks of %lld; %s; %d threads, %s",
             number(options.query_heads), number(options.kv_heads), number(options.head_dim), number(options.topk),
             number(options.block_size), options.dtype.c_str(), result.threads, result.instruction_set.c_str());
  const std::pair<const char*, Curve> rows[] = {{"torch sdpa float32", Curve::kTorchFloat32},
                                                {"torch sdpa bfloat16", Curve::kTorchBFloat16},
                                                {"dense_attention", Curve::kDense},
                                                {"msa layer (select + sparse)", Curve::kMsa}};
  for (const OpBenchRow& row : result.rows) {
    for (const auto& [name, curve] : rows) {
      if (row.section == "prefill" && row.name == name) {
        plot.points.push_back({curve, static_cast<double>(row.context), row.seconds});
      }
    }
  }
  return plot;
}

std::string draw(const Plot& plot) {
  const std::vector<Line> lines = collect(plot);
  if (lines.empty() || lines.back().series->curve != Curve::kMsa) {
    throw Error("bench: there is no time of an MSA layer to plot; time the op layer, or all");
  }
  double least_x = lines[0].points[0].context, most_x = least_x;
  double least_y = lines[0].points[0].milliseconds, most_y = least_y;
  std::vector<double> contexts;
  for (const Line& drawn : lines) {
    for (const Point& point : drawn.points) {
      least_x = std::min(least_x, point.context), most_x = std::max(most_x, point.context);
      least_y = std::min(least_y, point.milliseconds), most_y = std::max(most_y, point.milliseconds);
      contexts.push_back(point.context);
    }
  }
  std::sort(contexts.begin(), contexts.end());
  contexts.erase(std::unique(contexts.begin(), contexts.end()), contexts.end());

  constexpr double kWidth = 860, kHeight = 520;
  // Half a step of room at either side; on the y axis out to whole decades' thirds.
  const Axis x{least_x / 1.25, most_x * 1.25, 84, 640};
  const Axis y{std::pow(10, std::floor(std::log10(least_y) * 3) / 3),
               std::pow(10, std::ceil(std::log10(most_y) * 3) / 3), 440, 84};
  std::string svg = format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %g %g\" font-family=\"Helvetica, Arial, "
      "sans-serif\" font-size=\"13\" fill=\"#222\">\n<rect width=\"%g\" height=\"%g\" fill=\"white\"/>\n",
      kWidth, kHeight, kWidth, kHeight);
  svg += text(84, 34, escape(plot.title), "font-size=\"18\" font-weight=\"bold\"");
  svg += text(84, 56, escape(plot.subtitle), "fill=\"#555\"");

  // The grid: 1, 2 and 5 of every decade, and the contexts that were timed.
  for (double decade = std::pow(10, std::floor(std::log10(y.low))); decade <= y.high; decade *= 10) {
    for (const double step : {1.0, 2.0, 5.0}) {
      const double value = decade * step;
      if (value < y.low * 0.999 || value > y.high * 1.001) continue;
      const double at = y.at(value);
      svg += line(x.begin, at, x.end, at, step == 1.0 ? "stroke=\"#bbb\"" : "stroke=\"#e6e6e6\"");
      svg += text(x.begin - 8, at + 4, time_text(value), "text-anchor=\"end\"");
    }
  }
  for (const double context : contexts) {
    svg += line(x.at(context), y.begin, x.at(context), y.end, "stroke=\"#e6e6e6\"");
    svg += text(x.at(context), y.begin + 20, tokens_text(context), "text-anchor=\"middle\"");
  }
  svg += line(x.begin, y.begin, x.end, y.begin, "stroke=\"#222\"");
  svg += line(x.begin, y.begin, x.begin, y.end, "stroke=\"#222\"");
  svg += text((x.begin + x.end) / 2, y.begin + 44, "context, tokens", "text-anchor=\"middle\"");
  svg += text(
      0, 0, "time",
      format("text-anchor=\"middle\" transform=\"translate(22 %.1f) rotate(-90)\"", (y.begin + y.end) / 2).c_str());

  // Labels at the ends of the lines, pushed apart where they would overlap.
  struct Label {
    const Line* drawn;
    double y;
  };
  std::vector<Label> labels;
  for (const Line& drawn : lines) labels.push_back({&drawn, y.at(drawn.points.back().milliseconds)});
  std::sort(labels.begin(), labels.end(), [](const Label& a, const Label& b) { return a.y < b.y; });
  for (std::size_t i = 1; i < labels.size(); ++i) labels[i].y = std::max(labels[i].y, labels[i - 1].y + 32);

  const double msa = lines.back().points.back().milliseconds;
  const double msa_context = lines.back().points.back().context;
  for (const Label& label : labels) {
    const Series& series = *label.drawn->series;
    std::string path;
    for (const Point& point : label.drawn->points) {
      path += format("%s%.1f %.1f", path.empty() ? "M" : " L", x.at(point.context), y.at(point.milliseconds));
    }
    svg += "<path d=\"" + path + "\" fill=\"none\" ";
    svg += format("stroke=\"%s\" stroke-width=\"%g\" stroke-dasharray=\"%s\"/>\n", series.colour, series.width,
                  series.dash);
    for (const Point& point : label.drawn->points) {
      svg += format("<circle cx=\"%.1f\" cy=\"%.1f\" r=\"%g\" fill=\"%s\"/>\n", x.at(point.context),
                    y.at(point.milliseconds), series.width + 1, series.colour);
    }
    const Point& last = label.drawn->points.back();
    svg += line(x.at(last.context) + 8, y.at(last.milliseconds), x.end + 8, label.y - 4,
                format("stroke=\"%s\" stroke-width=\"0.7\"", series.colour).c_str());
    svg += text(x.end + 12, label.y, series.label, format("fill=\"%s\" font-weight=\"bold\"", series.colour).c_str());
    std::string note =
        last.milliseconds >= 100 ? format("%.2f s", last.milliseconds / 1000) : format("%.1f ms", last.milliseconds);
    note += " at " + tokens_text(last.context);
    if (last.context == msa_context && last.milliseconds != msa)
      note += format(", MSA %.1fx faster", last.milliseconds / msa);
    svg += text(x.end + 12, label.y + 14, note, "fill=\"#555\" font-size=\"11\"");
  }
  // The legend: what is solid, what is dashed.
  double at = 0;
  for (const Line& drawn : lines) {
    const Series& series = *drawn.series;
    const double left = 84 + at;
    svg += line(
        left, kHeight - 16, left + 28, kHeight - 16,
        format("stroke=\"%s\" stroke-width=\"%g\" stroke-dasharray=\"%s\"", series.colour, series.width, series.dash)
            .c_str());
    svg += text(left + 34, kHeight - 12, series.label, "font-size=\"12\"");
    at += 190;
  }
  return svg + "</svg>\n";
}

}  // namespace msa::bench
