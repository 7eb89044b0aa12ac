// A picture on which one box is drawn with mouse, finger or keys. Emits `box`: [left, top, right, bottom] in pixels of
// the picture, or null. The box is drawn here, not by the server, so that it keeps up with the hand over slow tunnels.
export default {
  template: `
    <div class="box-image" tabindex="0" role="application" :aria-label="label" @keydown="onKey" @keyup="onKeyUp">
      <img ref="img" :src="src" :alt="alt" draggable="false"
           @pointerdown.prevent="onDown" @pointermove="onMove" @pointerup="onUp" @pointercancel="onUp" />
      <svg :viewBox="'0 0 ' + side + ' ' + side" preserveAspectRatio="none" aria-hidden="true">
        <path v-if="box" class="shade" fill-rule="evenodd" :d="shade" />
        <rect v-if="box" class="edge" :x="box[0]" :y="box[1]" :width="box[2] - box[0]" :height="box[3] - box[1]" />
      </svg>
    </div>
  `,
  props: { src: String, alt: String, label: String, side: Number },
  data() {
    return { box: null, start: null };
  },
  watch: {
    src() {
      this.box = this.start = null; // of another picture
    },
  },
  computed: {
    shade() {
      const [left, top, right, bottom] = this.box;
      return `M0 0H${this.side}V${this.side}H0ZM${left} ${top}V${bottom}H${right}V${top}Z`;
    },
  },
  methods: {
    at(event) {
      const frame = this.$refs.img.getBoundingClientRect();
      const clip = (share) => Math.min(1, Math.max(0, share)) * this.side;
      return [clip((event.clientX - frame.left) / frame.width), clip((event.clientY - frame.top) / frame.height)];
    },
    between([x0, y0], [x1, y1]) {
      // Outwards, so that every pixel that the pointer went over is inside.
      return [
        Math.floor(Math.min(x0, x1)),
        Math.floor(Math.min(y0, y1)),
        Math.ceil(Math.max(x0, x1)),
        Math.ceil(Math.max(y0, y1)),
      ];
    },
    onDown(event) {
      if (event.button !== 0) return;
      this.$el.focus();
      event.target.setPointerCapture(event.pointerId);
      this.start = this.at(event);
      this.box = null;
    },
    onMove(event) {
      if (this.start) this.box = this.between(this.start, this.at(event));
    },
    onUp() {
      if (!this.start) return;
      this.start = null;
      if (this.box && Math.min(this.box[2] - this.box[0], this.box[3] - this.box[1]) < 2) this.box = null; // a click
      this.$emit("box", this.box);
    },
    onKey(event) {
      const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
      if (event.key === "Escape") this.box = null;
      else if (event.key in steps) {
        const fine = event.ctrlKey || event.metaKey;
        const [dx, dy] = steps[event.key].map((step) => step * (fine ? 1 : Math.max(1, Math.round(this.side / 32))));
        const third = Math.floor(this.side / 3);
        const [left, top, right, bottom] = this.box || [third, third, this.side - third, this.side - third];
        if (event.shiftKey) {
          this.box = [
            left,
            top,
            Math.min(this.side, Math.max(left + 2, right + dx)),
            Math.min(this.side, Math.max(top + 2, bottom + dy)),
          ];
        } else {
          const x = Math.min(this.side - right, Math.max(-left, dx));
          const y = Math.min(this.side - bottom, Math.max(-top, dy));
          this.box = [left + x, top + y, right + x, bottom + y];
        }
      } else return;
      event.preventDefault();
    },
    onKeyUp(event) {
      if (event.key === "Escape" || event.key.startsWith("Arrow")) this.$emit("box", this.box);
    },
  },
};
