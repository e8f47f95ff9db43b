"""Scripts that read the chart page of the MLflow UI, for `Page.wait`. Their first argument is a chart's title."""

# The page scrolls on until the chart is there: one is made when its place comes into sight.
_FIND = """
const cards = [...document.querySelectorAll('[data-testid="experiment-view-compare-runs-card"]')];
const card = cards.find(card => card.querySelector('h4')?.title === arguments[0]);
if (!card) {
  document.querySelector('[data-testid="experiment-view-compare-runs-chart-area"]')?.scrollBy(0, 300);
  return null;
}
card.scrollIntoView({block: 'nearest'});
const plot = card.querySelector('.js-plotly-plot');
"""
# The lines as plotly has them: name, x and y of each, once those of so many runs are drawn (over more than 100 pixels).
# Runs come one by one, some with two lines.
CHART = f"""{_FIND}
const lines = (plot?.data ?? []).filter(line => line.x?.length);
const paths = [...card.querySelectorAll('.scatterlayer path.js-line')];
const width = Math.max(0, ...paths.map(path => path.getBoundingClientRect().width));
if (new Set(lines.map(line => line.name)).size < arguments[1] || width <= 100) return null;
return lines.map(line => [line.name, Array.from(line.x), Array.from(line.y)]);
"""
# Type and values of each part of another chart, once so many elements of a selector are drawn.
PARTS = f"""{_FIND}
if (card.querySelectorAll(arguments[1]).length < arguments[2]) return null;
const values = array => Array.from(array ?? []);
return plot.data.map(part => ({{type: part.type, x: values(part.x), y: values(part.y), z: values(part.z)}}));
"""
# Axes of parallel coordinates: name and ticks of each, once something is drawn between them.
AXES = f"""{_FIND}
const axes = [...card.querySelectorAll('.dimension')];
const canvas = card.querySelector('canvas.foreground');
if (!axes.length || !canvas) return null;
const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
if (!pixels.some(value => value)) return null;
return axes.map(axis => [
  axis.querySelector('.label').textContent, [...axis.querySelectorAll('.tick text')].map(tick => tick.textContent)
]);
"""
# Titles of the charts that the page has by now, once there are so many: those further down appear as one scrolls.
TITLES = """
const titles = [...document.querySelectorAll('[data-testid="experiment-view-compare-runs-card"] h4')];
return titles.length < arguments[0] ? null : titles.map(title => title.title);
"""
